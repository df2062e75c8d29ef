"""The one place that knows there are several ranks. World size 1 takes the same calls.

Gradients, sums and counts are combined here; nobody else asks for the rank or the world size.
"""

import inspect
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process among all that train together.

    Attributes:
        rank: 0 to ``size`` - 1.
        local_rank: the rank among those of this host, which picks the GPU.
        size: number of ranks.
        device: where this rank computes.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the journal and the checkpoints."""
        return self.rank == 0


@contextmanager
def joined_world(accelerator: str, rendezvous_dir: Path, timeout: float) -> Iterator[World]:
    """Join the process group of the ranks that elastic started, and leave it at the end.

    Ranks find each other through a file in ``rendezvous_dir`` (a TCP store would listen on all interfaces).

    Args:
        accelerator: ``cpu`` (gloo) or ``gpu`` (NCCL, one GPU a rank).
        rendezvous_dir: a folder that only this job uses.
        timeout: seconds a collective operation may take.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if accelerator == "gpu" else torch.device("cpu")
    if accelerator == "gpu":
        torch.cuda.set_device(device)
    # All ranks are on this machine: nothing need listen beyond it, whatever a cluster's environment says.
    os.environ["NCCL_SOCKET_IFNAME" if accelerator == "gpu" else "GLOO_SOCKET_IFNAME"] = "lo"
    # The watchdog's questions about collectives are not allowed while a CUDA graph is captured. A dead rank is the
    # launcher's to notice.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    with _threads_that_do_not_preempt() if accelerator == "cpu" else nullcontext():
        dist.init_process_group(
            "nccl" if accelerator == "gpu" else "gloo",
            init_method=f"file://{rendezvous_dir}/ranks-{attempt}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
    try:
        yield World(rank, local_rank, size, device)
    except BaseException:
        if accelerator == "cpu":  # NCCL would wait for collectives that never end
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def _threads_that_do_not_preempt() -> Iterator[None]:
    """Threads that are started meanwhile preempt none that runs, but for the scheduler's tick.

    On a rank's only core the thread of gloo's that reads from sockets is woken while another one writes, cannot take
    the lock that the writer holds, and asks again until the next tick: averaging 2.7 MB took 3.8 ms, and so takes 0.9.
    """
    if not hasattr(os, "SCHED_BATCH") or os.sched_getscheduler(0) != os.SCHED_OTHER:  # not Linux, or somebody's choice
        yield
        return
    with suppress(OSError):  # a sandbox may refuse it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum over all ranks, in place."""
    dist.all_reduce(values)
    return values


def gathered(value: T) -> list[T]:
    """Each rank's value, by rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def rows(values: Sequence[float], device: torch.device) -> Tensor:
    """Each rank's ``values``, by rank: (ranks, len(values)) float64, on every rank."""
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    of_all = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(of_all, mine)
    return torch.stack(of_all)


def wait_for_all() -> None:
    """Return when all ranks have come here."""
    dist.barrier()


def differentiable_rows(row: Tensor) -> Tensor:
    """Each rank's ``row``, by rank: (K,) -> (ranks, K). Gradients flow back to the rank that a row came from."""
    mine = [row if rank == dist.get_rank() else torch.zeros_like(row) for rank in range(dist.get_world_size())]
    of_all: Tensor = _DifferentiableSum.apply(torch.stack(mine))
    return of_all


class _DifferentiableSum(torch.autograd.Function):
    """The sum over ranks. Each rank's loss depends on it, so that the gradients are added up over ranks as well."""

    @staticmethod
    def forward(_context: Any, values: Tensor) -> Tensor:
        return sum_over_ranks(values.clone())

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0].contiguous().clone())


def mean_over_ranks(values: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor's mean over ranks as float64, in one collective; all are on one device.

    In float64 the mean of equal float32 values is that value, whatever the number of ranks.
    """
    if not values:
        return []
    mean = sum_over_ranks(torch.cat([value.flatten().double() for value in values])) / dist.get_world_size()
    return _apart(mean, values)


def average_buffers(model: nn.Module) -> None:
    """Replace floating-point buffers by their mean over ranks."""
    buffers = _floating_buffers(model)
    for buffer, mean in zip(buffers, mean_over_ranks(buffers), strict=True):
        buffer.copy_(mean)


def share_first_ranks_buffers(model: nn.Module) -> None:
    """Replace floating-point buffers by those of the first rank, in one collective."""
    buffers = _floating_buffers(model)
    if not buffers:
        return
    together = torch.cat([buffer.flatten() for buffer in buffers])
    dist.broadcast(together, src=0)
    for buffer, first in zip(buffers, _apart(together, buffers), strict=True):
        buffer.copy_(first)


def _floating_buffers(model: nn.Module) -> list[Tensor]:
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def _apart(together: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of what was flattened and put together, shaped as those in ``like``."""
    parts = together.split([value.numel() for value in like])
    return [part.view_as(value) for part, value in zip(parts, like, strict=True)]


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
