"""Plan jobs that run side by side: which devices each slot has, and which job starts first."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import environ
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cifar_exp.config.reading import read_section
from cifar_exp.config.schema import Devices
from cifar_exp.errors import ConfigError

GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
ALONE = "Set hydra/launcher=basic to run one job after the other"
_IMAGES = 50_000  # of a dataset whose settings do not limit them


@dataclass(frozen=True)
class Slot:
    """The devices of one process, which runs one job at a time.

    Attributes:
        cores: the CPU cores that its processes may use.
        gpus: the value of ``CUDA_VISIBLE_DEVICES``; None leaves the variable as it is.
    """

    cores: tuple[int, ...]
    gpus: str | None = None

    def __str__(self) -> str:
        cores = ",".join(map(str, self.cores))
        return f"core{'s'[: len(self.cores) > 1]} {cores}" if self.gpus is None else f"GPU {self.gpus}"


def plan_slots(configs: Sequence[DictConfig], most: int | None) -> list[Slot]:
    """Divide the devices of this machine into slots of the size that every job needs.

    Args:
        configs: the configurations of the jobs. A configuration of another program has no ``devices``: it gets a core.
        most: the largest number of slots; None: no limit.

    Raises:
        ConfigError: the jobs need different devices.
        MachineError: the machine has fewer devices than a job needs.
    """
    from cifar_exp.launch.devices import find_devices  # it imports PyTorch
    from cifar_exp.system.cpu_quota import usable_cores
    from cifar_exp.system.host import own_cores

    wanted = {read_section(Devices, config, "devices"): None for config in configs if "devices" in config}
    found = list({find_devices(devices): None for devices in wanted})
    _check_equal(list(wanted), found)
    cores = own_cores()[: usable_cores()]
    needed = found[0] if found else None
    if needed and needed.accelerator == "gpu":
        names = visible_gpus(environ.get(GPU_VARIABLE), needed.found)
        parts = _parts(names, needed.world_size, most)
        own = _parts(cores, max(1, len(cores) // len(parts)), len(parts)) or [cores]
        return [Slot(tuple(own[place % len(own)]), ",".join(gpus)) for place, gpus in enumerate(parts)]
    if needed and needed.accelerator != "cpu":
        return [Slot(tuple(own_cores()))]
    size = min(len(cores), needed.world_size * needed.threads) if needed else 1
    return [Slot(tuple(part)) for part in _parts(cores, size, most)]


def _parts(devices: Sequence[Any], size: int, most: int | None) -> list[Sequence[Any]]:
    """Disjoint parts of ``size`` devices, ``most`` at most."""
    return [devices[start : start + size] for start in range(0, len(devices) - size + 1, size)][:most]


def visible_gpus(variable: str | None, found: int) -> list[str]:
    """The names of the GPUs that this process sees, for ``CUDA_VISIBLE_DEVICES`` of a job."""
    named = [name.strip() for name in (variable or "").split(",") if name.strip()]
    return named[:found] if variable is not None else [str(number) for number in range(found)]


def _check_equal(wanted: Sequence[Devices], found: Sequence[Any]) -> None:
    """Refuse a sweep over devices.

    Raises:
        ConfigError: the jobs need different devices.
    """
    if len(found) > 1:
        counts = ",".join(str(count) for count in {devices.count: None for devices in wanted})
        raise ConfigError(
            f"hydra/launcher=packed: the jobs need different devices (devices.count={counts}). Jobs that run side by "
            f"side disturb each other, so their speedup would be wrong. {ALONE}, or set one devices.count"
        )


def check_devices(configs: Sequence[DictConfig], most: int | None) -> None:
    """Check that the jobs of a sweep can run side by side. See :func:`plan_slots` for what is raised."""
    if most is not None and (type(most) is not int or most < 1):
        raise ConfigError(f"hydra.launcher.n_jobs={most}: it must be 1 or more, or null for as many as fit")
    plan_slots(configs, most)


def estimated_work(config: DictConfig) -> float:
    """How long a job takes, in arbitrary units: epochs x training images x width^2 x depth.

    The multiply-adds of a convolution grow with the square of the width. Only the order of the jobs depends on the
    estimate: the longest starts first, so that no long job is left alone at the end. A setting that a network does not
    have counts as 1.
    """
    epochs, width, depth = (_positive(config, name, 1) for name in ("train.epochs", "model.width", "model.depth"))
    return epochs * _positive(config, "data.train_count", _IMAGES) * width**2 * depth


def _positive(config: DictConfig, name: str, default: float) -> float:
    value = OmegaConf.select(config, name, default=default, throw_on_resolution_failure=False)
    return float(value) if isinstance(value, int | float) and value > 0 else default
