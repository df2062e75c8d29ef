"""Find the devices of this machine and choose those of a run."""

from dataclasses import dataclass, replace

import torch

from cifar_exp.config.schema import Devices
from cifar_exp.errors import ConfigError, MachineError
from cifar_exp.system.cpu_quota import cpu_quota, usable_cores


@dataclass(frozen=True)
class DeviceSet:
    """The devices that a run uses.

    Attributes:
        accelerator: ``cpu``, ``gpu`` or ``mps``.
        world_size: number of ranks.
        threads: CPU threads per rank.
        found: number of GPUs; on CPUs, number of cores that CPU affinity and the container's CPU quota allow.
        oversubscribed: whether ranks share a core.
        hosts: number of hosts, which have equally many ranks.
    """

    accelerator: str
    world_size: int
    threads: int
    found: int
    oversubscribed: bool
    hosts: int = 1

    def __str__(self) -> str:
        unit = "core" if self.accelerator == "cpu" else "GPU"
        used = f"{self.world_size} rank{'s'[: self.world_size > 1]} x {self.threads} thread{'s'[: self.threads > 1]}"
        if self.accelerator != "cpu":
            used = f"{self.world_size} GPU{'s'[: self.world_size > 1]}"
        shared = ", oversubscribed" if self.oversubscribed else ""
        if self.hosts > 1:
            used += f" on {self.hosts} hosts"
            shared += " here"
        return f"{used} (found {self.found} {unit}{'s'[: self.found > 1]}{shared})"


def find_devices(wanted: Devices, hosts: int = 1) -> DeviceSet:
    """Resolve ``auto`` and check the requested devices. CUDA is not initialised: only its device count is read.

    Args:
        wanted: the settings ``devices``; ``count`` is over all hosts.
        hosts: number of hosts, which have equally many ranks.

    Raises:
        MachineError: the machine has fewer devices than requested.
        ConfigError: the hosts cannot share the ranks evenly.
    """
    if hosts == 1:
        return _devices_here(wanted)
    if wanted.count != "auto" and wanted.count % hosts:
        raise ConfigError(
            f"devices.count={wanted.count}: launcher.hosts={hosts} share the ranks evenly. Set devices.count="
            f"{max(hosts, wanted.count // hosts * hosts)}"
        )
    here = _devices_here(replace(wanted, count="auto" if wanted.count == "auto" else wanted.count // hosts))
    return replace(here, world_size=here.world_size * hosts, hosts=hosts)


def _devices_here(wanted: Devices) -> DeviceSet:
    """The devices of this host; ``wanted.count`` is of this host alone."""
    cores = usable_cores()
    gpus = torch.cuda.device_count()
    accelerator = wanted.accelerator
    if accelerator == "auto":
        accelerator = "gpu" if gpus else "mps" if torch.backends.mps.is_available() else "cpu"
    if accelerator == "gpu":
        if gpus == 0:
            raise MachineError("devices.accelerator=gpu: requested GPUs, found 0. Set devices=cpu")
        count = gpus if wanted.count == "auto" else wanted.count
        threads = max(1, cores // count) if wanted.threads == "auto" else wanted.threads
        if count > gpus:
            raise MachineError(
                f"devices.count={count}: requested {count} GPUs, found {gpus}. NCCL takes one rank per GPU. Set "
                f"devices.count={gpus}, or devices=cpu"
            )
        return DeviceSet("gpu", count, threads, gpus, oversubscribed=False)
    if accelerator == "mps":
        return _apples_gpu(wanted, cores)
    count = 1 if wanted.count == "auto" else wanted.count
    threads = (cores if wanted.count == "auto" else 1) if wanted.threads == "auto" else wanted.threads
    needed = count * threads
    if needed > cores and not wanted.oversubscribe:
        fits = f"devices.count={cores}" if wanted.threads == "auto" else f"devices.threads={max(1, cores // count)}"
        raise MachineError(
            f"devices.count={wanted.count} devices.threads={wanted.threads}: requested {needed} cores, found "
            f"{cores}{_by_quota()}. Set {fits}, or devices.oversubscribe=true to share them"
        )
    return DeviceSet("cpu", count, threads, cores, oversubscribed=needed > cores)


def _by_quota() -> str:
    """Why fewer cores are usable than the machine shows, for a message; empty without a quota."""
    quota = cpu_quota()
    return "" if quota is None else f" (the container has a CPU quota of {quota:g})"


def check_apples_gpu(wanted: Devices) -> None:
    """Check the devices of a run on Apple's GPU. Other devices are checked by :func:`find_devices`.

    Raises:
        MachineError: PyTorch finds no such GPU, or more than one rank is requested.
    """
    is_chosen = wanted.accelerator == "auto" and not torch.cuda.device_count() and torch.backends.mps.is_available()
    if wanted.accelerator == "mps" or is_chosen:
        _apples_gpu(wanted, usable_cores())


def _apples_gpu(wanted: Devices, cores: int) -> DeviceSet:
    if not torch.backends.mps.is_available():
        raise MachineError(
            "devices.accelerator=mps: requested Apple's GPU, found none that PyTorch can use. Set devices=cpu"
        )
    if wanted.count not in ("auto", 1):
        raise MachineError(
            f"devices.count={wanted.count}: requested {wanted.count} devices, found 1: Apple's GPU takes one rank. Set "
            f"devices.count=1, or devices=cpu devices.count={wanted.count} for ranks of one core each"
        )
    return DeviceSet("mps", 1, cores if wanted.threads == "auto" else wanted.threads, 1, oversubscribed=False)


def device_counts(wanted: Devices) -> list[int]:
    """The powers of two up to the number of devices of this machine.

    Args:
        wanted: the settings ``devices``; ``count`` is ignored.

    Raises:
        MachineError: the machine has no device of the requested kind.
    """
    found = find_devices(replace(wanted, count="auto", threads="auto"))
    threads = wanted.threads if found.accelerator == "cpu" and isinstance(wanted.threads, int) else 1
    return [2**power for power in range((found.found // threads).bit_length())] or [1]
