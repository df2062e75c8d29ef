"""The one place that knows there are several ranks. World size 1 takes the same calls.

Gradients, sums and counts are combined here; nobody else asks for the rank or the world size.
"""

import inspect
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from cifar_exp.distributed.collectives import sum_over_ranks
from cifar_exp.distributed.process_group import World


@dataclass
class Communication:
    """What averaging gradients over ranks takes. Measured on the host's clock, so on CPU ranks only.

    Attributes:
        exposed: for each step since they were last taken, the seconds from the moment at which the last bucket of
            gradients was complete to the end of the backward pass, which had nothing left to compute meanwhile.
        averaging: seconds since then in which some bucket was on its way, exposed or not; a bucket waits for the
            slowest rank, too.
    """

    exposed: list[float] = field(default_factory=list)
    averaging: float = 0.0
    _last_bucket: float | None = field(default=None, repr=False)
    _on_the_way: int = field(default=0, repr=False)
    _since: float = field(default=0.0, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)  # averaged in a thread of gloo's

    def bucket_complete(self) -> None:
        with self._lock:
            self._last_bucket = time.perf_counter()
            self._since = self._since if self._on_the_way else self._last_bucket
            self._on_the_way += 1

    def bucket_averaged(self) -> None:
        with self._lock:
            self._on_the_way -= 1
            if not self._on_the_way:
                self.averaging += time.perf_counter() - self._since

    def backward_done(self) -> None:
        if self._last_bucket is not None:
            self.exposed.append(time.perf_counter() - self._last_bucket)
            self._last_bucket = None

    def take(self) -> tuple[list[float], float]:
        """The seconds exposed in each step, and those hidden behind backward passes in all; counting starts again."""
        exposed, averaging = self.exposed, self.averaging
        self.exposed, self.averaging = [], 0.0
        return exposed, max(0.0, averaging - sum(exposed))


def sent_bytes(size: int, ranks: int) -> float:
    """What each rank sends to sum ``size`` bytes over all in a ring: 2 (n - 1) / n of it (Patarasuk and Yuan 2009)."""
    return 2 * (ranks - 1) / ranks * size


def link_bytes_per_second(size: int, device: torch.device) -> float:
    """What each rank sends in a second while they average ``size`` bytes and do nothing else: the median of five."""
    values, seconds = torch.zeros(max(1, size // 4), device=device), []
    for _ in range(6):
        dist.barrier()
        begin = time.perf_counter()
        sum_over_ranks(values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return sent_bytes(size, dist.get_world_size()) / median(seconds[1:])


def data_parallel(model: nn.Module, world: World) -> tuple[nn.Module, Communication]:
    """The module to train: ``model`` itself on one rank, else DDP around it, which averages gradients over ranks.

    Buffers are not broadcast at each step, which would cost a collective; ``batch_norm.settle`` combines them before
    they are used.
    """
    communication = Communication()
    if world.size == 1:
        return model, communication
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    # torch 2.13 renamed the option.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    settings: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    if world.device.type == "cpu":
        # One bucket: gloo's threads run on the ranks' own cores, where averaging in the midst of a backward pass delays
        # it by more than is gained (benchmarks/README.md).
        settings["bucket_cap_mb"] = gradient_bytes(model) // 2**20 + 1
    with _side_stream(world.device):
        parallel = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, **settings)
    if world.device.type == "cpu":
        parallel.register_comm_hook(communication, _average_and_note)
    return parallel, communication


def gradient_bytes(model: nn.Module) -> int:
    """Bytes that ranks average in each step."""
    return sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, a stream other than the default one: DDP that is to be captured in a CUDA graph must be made there."""
    if device.type != "cuda":
        yield
        return
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream(device).wait_stream(side)


def _average_and_note(communication: Communication, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    communication.bucket_complete()
    gradients = bucket.buffer().div_(dist.get_world_size())

    def averaged(done: torch.futures.Future[list[Tensor]]) -> Tensor:
        communication.bucket_averaged()
        return done.value()[0]

    return dist.all_reduce(gradients, async_op=True).get_future().then(averaged)
