"""Which devices there are, and which of them a run takes."""

from dataclasses import dataclass

import torch

from cifar_exp.config.schema import Devices
from cifar_exp.errors import MachineError
from cifar_exp.system.host import own_cores


@dataclass(frozen=True)
class DeviceSet:
    """The devices that a run uses.

    Attributes:
        accelerator: ``cpu``, ``gpu`` or ``mps``.
        count: number of ranks.
        threads: CPU threads a rank.
        found: GPUs or cores that this process may use.
        oversubscribed: whether ranks share a GPU or a core.
    """

    accelerator: str
    count: int
    threads: int
    found: int
    oversubscribed: bool

    def __str__(self) -> str:
        unit = "core" if self.accelerator == "cpu" else "GPU"
        used = f"{self.count} rank{'s'[: self.count > 1]} x {self.threads} thread{'s'[: self.threads > 1]}"
        if self.accelerator != "cpu":
            used = f"{self.count} GPU{'s'[: self.count > 1]}"
        shared = ", oversubscribed" if self.oversubscribed else ""
        return f"{used} (found {self.found} {unit}{'s'[: self.found > 1]}{shared})"


def find_devices(wanted: Devices) -> DeviceSet:
    """Turn ``auto`` and counts into devices. CUDA is asked for a count and not initialised.

    Raises:
        MachineError: where more is asked for than there is.
    """
    cores = len(own_cores())
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
                f"devices.count={count}: requested {count} GPUs, found {gpus}. NCCL takes one rank a GPU. Set "
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
            f"devices.count={wanted.count} devices.threads={wanted.threads}: requested {needed} cores, found {cores}. "
            f"Set {fits}, or devices.oversubscribe=true to share them"
        )
    return DeviceSet("cpu", count, threads, cores, oversubscribed=needed > cores)


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
    """1, 2, 4, ... up to the devices that this machine has.

    Raises:
        MachineError: where it has none of the kind that was asked for.
    """
    found = find_devices(Devices(accelerator=wanted.accelerator))
    threads = wanted.threads if found.accelerator == "cpu" and isinstance(wanted.threads, int) else 1
    return [2**power for power in range((found.found // threads).bit_length())] or [1]
