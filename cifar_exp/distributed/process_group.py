"""Join and leave the process group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cifar_exp.system import host
from cifar_exp.system.accelerator import device_of


@dataclass(frozen=True)
class World:
    """The place of this process among all that train together.

    Attributes:
        rank: 0 to ``size`` - 1.
        size: number of ranks.
        device: the device of this rank.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the journal and the checkpoints."""
        return self.rank == 0


@contextmanager
def joined_world(accelerator: str, rendezvous_dir: Path, timeout: float) -> Iterator[World]:
    """Join the process group of the ranks that torch elastic started, and leave it at the end.

    Ranks find each other through a file in ``rendezvous_dir``. A TCP store would listen on all interfaces.

    Args:
        accelerator: ``cpu`` (gloo), ``gpu`` (NCCL, one GPU a rank) or ``mps`` (gloo, one rank).
        rendezvous_dir: a private folder of this job.
        timeout: seconds a collective operation may take.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = device_of(accelerator, int(os.environ["LOCAL_RANK"]))
    if accelerator == "gpu":
        torch.cuda.set_device(device)
    # All ranks are on this machine: loopback is enough, whatever interface a cluster's environment names.
    os.environ["NCCL_SOCKET_IFNAME" if accelerator == "gpu" else "GLOO_SOCKET_IFNAME"] = host.loopback()
    # NCCL's watchdog queries collectives, which fails while a CUDA graph is captured. The launcher notices dead ranks.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # On a rank's only core, gloo's reading thread is woken while another one writes, cannot take the lock that the
    # writer holds, and spins until the next tick: averaging 2.7 MB took 3.8 ms in place of 0.9.
    with host.threads_that_do_not_preempt() if accelerator == "cpu" else nullcontext():
        dist.init_process_group(
            "nccl" if accelerator == "gpu" else "gloo",
            init_method=f"file://{rendezvous_dir}/ranks-{attempt}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
    try:
        yield World(rank, size, device)
    except BaseException:
        if accelerator != "gpu":  # NCCL would wait forever for collectives of ranks that are gone
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
