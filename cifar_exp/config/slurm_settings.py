"""The settings of `hydra/launcher=slurm`, and what they mean for one job."""

import re
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from cifar_exp.config.messages import shown
from cifar_exp.config.schema import Count, Devices, Name, NonNegativeCount, PositiveFloat
from cifar_exp.errors import ConfigError

SECTION = "hydra.launcher"
# Slurm's names and expressions. They are written into a shell script: without spaces, line ends and quotes.
WORD = re.compile(r"[\w.,:|&()\[\]*@/+=-]+")


@dataclass(frozen=True)
class SlurmSettings:
    """What a cluster must be told. The names are those of Slurm's ``sbatch``."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    partition: Name | None
    """Queue of the cluster; null means its default."""
    account: Name | None
    """Account that pays for the jobs; null means the user's default."""
    qos: Name | None
    """Quality of service; null means the user's default."""
    constraint: Name | None
    """Feature that the nodes must have; null means any node."""
    nodelist: Name | None
    """Nodes that must be used; null means any."""
    exclude: Name | None
    """Nodes that must not be used; null means none."""
    time: Count
    """Minutes after which Slurm ends a job."""
    cpus_per_task: Count | None
    """Cores of a job; null means what its ranks need, or, with GPUs, the cluster's default."""
    gpus_per_node: NonNegativeCount | None
    """GPUs of a job; null means one per rank with devices=gpu, else none."""
    gpu_type: Name | None
    """Type of the GPUs in Slurm's configuration; null means any."""
    mem_gb: PositiveFloat | None
    """Memory of a job in GB; null means the cluster's default."""
    exclusive: bool
    """Whether a job gets whole nodes."""
    array_parallelism: Count
    """Jobs of the sweep that run at the same time."""
    save_seconds: Count
    """Seconds before the time limit at which a job saves and is requeued."""
    max_requeues: NonNegativeCount
    """Number of restarts after which a job at its time limit is not requeued."""

    def check(self) -> None:
        """Check what the types do not say.

        Raises:
            ConfigError: a word does not fit on a line of ``sbatch``, or the times contradict each other.
        """
        for name, value in asdict(self).items():
            if isinstance(value, str) and not WORD.fullmatch(value):
                raise ConfigError(
                    f"{SECTION}.{name}={shown(value)}: it must be a name of Slurm's, without spaces and quotes. Set "
                    f"{SECTION}.{name}=<name>"
                )
        if self.save_seconds >= self.time * 60:
            raise ConfigError(
                f"{SECTION}.save_seconds={self.save_seconds}: it must be less than the time limit of {self.time * 60} "
                f"seconds. Set {SECTION}.time={self.save_seconds // 60 + 2}, which is in minutes"
            )


@dataclass(frozen=True)
class Resources:
    """What one job asks of Slurm.

    Attributes:
        cores: None leaves the number to the cluster.
        gpus: 0 for none.
    """

    cores: int | None
    gpus: int

    def __str__(self) -> str:
        parts = [(self.gpus, "GPU"), (self.cores or 0, "core")]
        return ", ".join(f"{count} {unit}{'s'[: count > 1]}" for count, unit in parts if count)

    def parameters(self, settings: SlurmSettings) -> dict[str, Any]:
        """The two numbers as parameters of submitit."""
        kind = f"{settings.gpu_type}:" if settings.gpu_type else ""
        gpus = {"gpus_per_node": f"{kind}{self.gpus}"} if self.gpus else {}
        # Since Slurm 22.05 `srun` does not take over this number from `sbatch`.
        cores = {"cpus_per_task": self.cores, "srun_args": [f"--cpus-per-task={self.cores}"]} if self.cores else {}
        return gpus | cores


def resources(settings: SlurmSettings, devices: Devices) -> Resources:
    """The cores and GPUs that a job with these devices needs.

    Raises:
        ConfigError: ``auto``: the nodes' devices are not known where the job is submitted.
    """
    if devices.accelerator == "mps":
        raise ConfigError("devices=mps: Slurm's nodes have no Apple GPU. Set devices=gpu or devices=cpu")
    gpus, cores = settings.gpus_per_node, settings.cpus_per_task
    if gpus is None:
        if devices.accelerator == "auto":
            raise ConfigError(
                "devices=auto: where a job is submitted, the devices of the cluster's nodes are not known. Set "
                f"devices=gpu or devices=cpu, or {SECTION}.gpus_per_node=<number>"
            )
        if devices.accelerator == "gpu" and devices.count == "auto":
            raise _unknown_count("gpus_per_node")
        gpus = devices.count if devices.accelerator == "gpu" and devices.count != "auto" else 0
    if cores is None and not gpus:
        if devices.count == "auto" and devices.threads == "auto":
            raise _unknown_count("cpus_per_task")
        count, threads = (1 if value == "auto" else value for value in (devices.count, devices.threads))
        cores = count * threads
    return Resources(cores, gpus)


def _unknown_count(setting: str) -> ConfigError:
    return ConfigError(
        f"devices.count=auto: Slurm must be told how many devices a job needs. Set devices.count=1, or "
        f"{SECTION}.{setting}=<number>"
    )
