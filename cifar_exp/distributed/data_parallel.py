"""Gradient averaging with DDP, and its time. A single rank trains the model without DDP."""

import inspect
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from cifar_exp.distributed.process_group import World


@dataclass
class Communication:
    """Time of the gradient all-reduce, by the host's clock. CPU ranks only: GPU kernels are asynchronous.

    Attributes:
        exposed: exposed communication in seconds, one value per step. It lasts from the completion of the last bucket
            of gradients to the end of the backward pass. The rank computes nothing in this time.
        averaging: seconds with at least one all-reduce in flight, including the wait for the straggler.
    """

    exposed: list[float] = field(default_factory=list)
    averaging: float = 0.0
    _last_bucket: float | None = field(default=None, repr=False)
    _in_flight: int = field(default=0, repr=False)
    _since: float = field(default=0.0, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)  # gloo calls back from its own thread

    def bucket_complete(self) -> None:
        """Called when the gradients of a bucket are computed and their averaging starts."""
        with self._lock:
            self._last_bucket = time.perf_counter()
            self._since = self._since if self._in_flight else self._last_bucket
            self._in_flight += 1

    def bucket_averaged(self) -> None:
        """Called when the averaging of a bucket has ended."""
        with self._lock:
            self._in_flight -= 1
            if not self._in_flight:
                self.averaging += time.perf_counter() - self._since

    def backward_done(self) -> None:
        """Called when the backward pass, and with it all averaging, has ended."""
        if self._last_bucket is not None:
            self.exposed.append(time.perf_counter() - self._last_bucket)
            self._last_bucket = None

    def take(self) -> tuple[list[float], float]:
        """Return the exposed seconds of each step and the overlapped seconds of all steps, and reset both."""
        exposed, averaging = self.exposed, self.averaging
        self.exposed, self.averaging = [], 0.0
        return exposed, max(0.0, averaging - sum(exposed))


def data_parallel(model: nn.Module, world: World, has_unused: bool = False) -> tuple[nn.Module, Communication]:
    """The module to train: ``model`` itself on one rank, else ``model`` in DDP, which averages gradients.

    DDP does not broadcast buffers at each step: that would be one more collective. ``batch_norm.combine_over_ranks``
    combines them before they are used.

    If a parameter may get no gradient in a step (``has_unused``, or a network with a user's code), DDP searches for
    such parameters in each step. A parameter that no rank has used gets no gradient, as on a single rank.
    """
    communication = Communication()
    if world.size == 1:
        return model, communication
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    # torch 2.13 renamed the option.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    settings: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    if world.device.type == "cpu":
        # One bucket, so no overlap: gloo's threads run on the ranks' own cores, where overlapped averaging delays the
        # backward pass by more than it saves (benchmarks/README.md).
        settings["bucket_cap_mb"] = gradient_bytes(model) // 2**20 + 1
    if has_unused or not _uses_all(model):
        settings["find_unused_parameters"] = True
        _silence_search_warning(world.device)
    with _side_stream(world.device):
        parallel = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True, **settings)
    if world.device.type == "cpu":
        parallel.register_comm_hook(communication, _average_and_measure)
    return parallel, communication


# Modules that use every parameter in every step. A user's module may skip some, as stochastic depth does.
STATIC = ("torch.nn.", "torchvision.", "cifar_exp.models.")
FUSED = ("cifar_exp.cpu_kernels.", "cifar_exp.distributed.")


def _uses_all(model: nn.Module) -> bool:
    """Whether the network has only known, unmodified layers."""
    return all(
        type(module).__module__.startswith((*STATIC, *FUSED)) and "forward" not in vars(module)
        for module in model.modules()
    )


def _silence_search_warning(device: torch.device) -> None:
    """Trigger and suppress torch's one-time warning that the search may not be needed."""
    saved = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), 2)
        layer = DistributedDataParallel(nn.Linear(1, 1, device=device), find_unused_parameters=True)
        layer(torch.zeros(1, 1, device=device)).sum().backward()
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of gradients that ranks average in each step."""
    return sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, a stream that is not the default one. DDP must be built there if a CUDA graph is to capture it."""
    if device.type != "cuda":
        yield
        return
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream(device).wait_stream(side)


def _average_and_measure(communication: Communication, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """DDP's communication hook: the default all-reduce, measured."""
    communication.bucket_complete()
    gradients = bucket.buffer().div_(dist.get_world_size())

    def averaged(done: torch.futures.Future[list[Tensor]]) -> Tensor:
        communication.bucket_averaged()
        return done.value()[0]

    return dist.all_reduce(gradients, async_op=True).get_future().then(averaged)
