"""Join and leave the process group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cifar_exp.distributed.host_place import HostPlace
from cifar_exp.distributed.host_store import Prefixed, StoreClient
from cifar_exp.distributed.rank_store import RankStore
from cifar_exp.system import host
from cifar_exp.system.accelerator import device_of


@dataclass(frozen=True)
class World:
    """Rank, world size and device of this process.

    Attributes:
        rank: 0 to ``size`` - 1.
        size: number of ranks.
        device: the device of this rank.
        hosts: number of hosts; each has equally many ranks, numbered one host after the other.
    """

    rank: int
    size: int
    device: torch.device
    hosts: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the journal and the checkpoints."""
        return self.rank == 0


@contextmanager
def joined_world(
    accelerator: str, rendezvous_dir: Path, timeout: float, place: HostPlace | None = None
) -> Iterator[World]:
    """Join the process group of the ranks that torch elastic started, and leave it at the end.

    Ranks find each other through a file in ``rendezvous_dir``, or over several hosts through the store of host 0.
    torch's TCP store would listen on all interfaces.

    Args:
        accelerator: ``cpu`` (gloo), ``gpu`` (NCCL, one GPU per rank) or ``mps`` (gloo, one rank).
        rendezvous_dir: a private folder of this job.
        timeout: seconds that a collective may take.
        place: this host among several; None for a run on one host.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])  # of this host
    if place:
        rank, size = place.first_rank + rank, size * place.hosts
    device = device_of(accelerator, int(os.environ["LOCAL_RANK"]))
    if accelerator == "gpu":
        torch.cuda.set_device(device)
    # On one host loopback is enough. A cluster's environment may name another interface.
    interface = place.interface if place else host.loopback()
    os.environ["NCCL_SOCKET_IFNAME" if accelerator == "gpu" else "GLOO_SOCKET_IFNAME"] = interface
    # NCCL's watchdog breaks CUDA graph capture, so it is off. The launcher's watchdog detects dead ranks instead.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store: Any
    if place:
        store = RankStore(Prefixed(StoreClient(place.address, place.token), f"{place.prefix}ranks/"), timeout)
    else:  # not as a URL: `?` and `#` in a path would change its meaning
        store = dist.FileStore(str(rendezvous_dir / f"ranks-{attempt}"), size)  # type: ignore[attr-defined]
    # On one core, gloo's reader thread preempts the writer and spins on its lock. SCHED_BATCH threads do not preempt.
    # Figures: benchmarks/README.md.
    with host.threads_that_do_not_preempt() if accelerator == "cpu" else nullcontext():
        dist.init_process_group(
            "nccl" if accelerator == "gpu" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
    try:
        yield World(rank, size, device, place.hosts if place else 1)
    except BaseException:
        if accelerator != "gpu":  # NCCL would wait forever for collectives of ranks that are gone
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
