"""How gradients are averaged over ranks, and what that takes.

GPUs average through NCCL. CPU ranks share a machine, and average in memory that all of them see: each writes its
gradients there, and when all have, each adds up the rows of all. Through gloo's sockets the same gradients would be
copied several times, by threads that take the ranks' cores from them in the midst of the backward pass.
"""

import math
import mmap
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel


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


class SharedRows:
    """Memory that all ranks of this machine see: a row of ``size`` values for each.

    There are two of each row, taken in turn. A rank that is ahead writes the next values while others still read the
    last ones; it cannot write those after, since all have to meet before.
    """

    def __init__(self, memory: Tensor) -> None:
        """``memory``: (2, ranks, size), seen by all."""
        self._memory, self._turn = memory, 0

    @classmethod
    def made(cls, size: int, dtype: torch.dtype) -> "SharedRows | None":
        """New ones; all ranks call it. None, on all of them, where a system does not let them share memory."""
        memory = _shared_memory((2, dist.get_world_size(), size), dtype)
        return None if memory is None else cls(memory)

    def put(self, values: Tensor, start: int) -> None:
        """Write this rank's share of a mean: ``values`` (N,) over the number of ranks, to places from ``start`` on."""
        row = self._memory[self._turn, dist.get_rank(), start : start + len(values)]
        torch.div(values, dist.get_world_size(), out=row)

    def meet(self) -> None:
        """Wait until all ranks have put theirs."""
        dist.barrier()

    def take(self, out: Tensor, start: int) -> None:
        """Write the mean from ``start`` on to ``out`` (N,): the sum of the rows in the order of the ranks."""
        first, *others = self._memory[self._turn, :, start : start + len(out)]
        out.copy_(first)
        for row in others:
            out.add_(row)

    def turn(self) -> None:
        """What is put next is for another mean."""
        self._turn = 1 - self._turn


def _shared_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """A tensor of zeros that all ranks see. It has no name, so that nothing of it is left however they end."""
    size, descriptor = math.prod(shape) * dtype.itemsize, -1
    if dist.get_rank() == 0 and hasattr(os, "memfd_create"):  # Linux
        with suppress(OSError):  # as where files may not grow to its size (RLIMIT_FSIZE)
            descriptor = os.memfd_create("gradients")
            os.ftruncate(descriptor, size)
    place = [f"/proc/{os.getpid()}/fd/{descriptor}"]
    dist.broadcast_object_list(place, src=0)
    memory: mmap.mmap | None = None
    with suppress(OSError, ValueError), Path(place[0]).open("r+b") as file:  # there is none, or it has not grown
        memory = mmap.mmap(file.fileno(), size)
    seen = torch.tensor(int(memory is not None))
    dist.all_reduce(seen)
    if descriptor >= 0:
        os.close(descriptor)
    if memory is None or seen < dist.get_world_size():
        return None
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@dataclass
class SharedAverage:
    """DDP's hook that averages in shared memory.

    Attributes:
        rows: as long as all gradients together.
        communication: counts the time that it takes.
    """

    rows: SharedRows
    communication: Communication
    _waiting: list[tuple[Tensor, int, Future[Tensor]]] = field(default_factory=list)  # bucket, its start, its mean

    def __call__(self, bucket: GradBucket) -> Future[Tensor]:
        """Put the bucket; the last one waits for all ranks, and makes the means of all buckets."""
        self.communication.bucket_complete()
        gradients, mean = bucket.buffer(), Future[Tensor]()
        start = self._waiting[-1][1] + len(self._waiting[-1][0]) if self._waiting else 0
        self.rows.put(gradients, start)
        self._waiting.append((gradients, start, mean))
        if bucket.is_last():
            self.rows.meet()
            for out, place, done in self._waiting:
                self.rows.take(out, place)
                done.set_result(out)
            self.rows.turn()
            self._waiting = []
        self.communication.bucket_averaged()
        return mean


def average_through_gloo(communication: Communication, bucket: GradBucket) -> Future[Tensor]:
    """DDP's hook where ranks cannot share memory."""
    communication.bucket_complete()
    gradients = bucket.buffer().div_(dist.get_world_size())

    def averaged(done: Future[list[Tensor]]) -> Tensor:
        communication.bucket_averaged()
        return done.value()[0]

    return dist.all_reduce(gradients, async_op=True).get_future().then(averaged)


def average_on_cpus(parallel: DistributedDataParallel, communication: Communication) -> None:
    """Have DDP average the gradients of CPU ranks, all of one machine, and count the time."""
    gradients = [parameter for parameter in parallel.parameters() if parameter.requires_grad]
    types = {parameter.dtype for parameter in gradients}
    rows = SharedRows.made(sum(map(Tensor.numel, gradients)), *types) if len(types) == 1 else None
    if rows:
        parallel.register_comm_hook(SharedAverage(rows, communication), SharedAverage.__call__)
    else:
        parallel.register_comm_hook(communication, average_through_gloo)


def sent_bytes(size: int, ranks: int) -> float:
    """What each rank sends to sum ``size`` bytes over all in a ring: 2 (n - 1) / n of it (Patarasuk and Yuan 2009)."""
    return 2 * (ranks - 1) / ranks * size


def link_bytes_per_second(size: int, device: torch.device) -> float:
    """What each rank sends in a second while they average ``size`` bytes and do nothing else: the median of five."""
    values, seconds = torch.zeros(max(1, size // 4), device=device), []
    average = _averaging(values)
    for _ in range(6):
        dist.barrier()
        begin = time.perf_counter()
        average()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return sent_bytes(size, dist.get_world_size()) / median(seconds[1:])


def _averaging(values: Tensor) -> Callable[[], None]:
    """What averages ``values`` as gradients are."""
    rows = SharedRows.made(len(values), values.dtype) if values.device.type == "cpu" else None

    def in_shared_memory() -> None:
        assert rows
        rows.put(values, 0)
        rows.meet()
        rows.take(values, 0)
        rows.turn()

    def by_collective() -> None:
        dist.all_reduce(values)

    return in_shared_memory if rows else by_collective
