"""The typed configuration: type, meaning, unit and range of each setting. The defaults are in ``conf/``.

These are plain classes, and every module may import them. ``reading.py`` converts composed YAML to these classes
and reports wrong settings.

Fixed keys: ``train``, ``devices``, ``checkpoint``, ``early_stopping``, ``report``. The signature of the ``_target_``
gives the keys of the other sections. ``COMMON``: keys that are checked before that import.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Required

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import StringConstraints
from typing_extensions import TypedDict  # before Python 3.12 pydantic does not support the TypedDict of typing

Count = Annotated[int, Ge(1)]
NonNegativeCount = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0), Lt(math.inf)]
NonNegativeFloat = Annotated[float, Ge(0), Lt(math.inf)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
Share = Annotated[float, Gt(0), Le(1)]
Name = Annotated[str, MinLen(1)]
Auto = Literal["auto"]
BatchNorm = Literal["averaged", "local", "synchronized", "population"]
Section = dict[str, Any]  # an open section: `_target_` and the keywords it is called with

_CLOSED: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class Train:
    """The training loop."""

    __pydantic_config__: ClassVar = _CLOSED
    epochs: Count
    """Passes over the training images."""
    batch_size: Count
    """Images per step: of each device with weak scaling, of all devices together with strong scaling."""
    scaling: Literal["weak", "strong"]
    """Whether the global batch grows with the number of devices (weak) or stays the same (strong)."""
    accumulate: Count
    """Micro-batches per device and step, whose gradients are accumulated."""
    lr_scaling: Literal["linear", "sqrt", "none", "linear_warmup"]
    """How the learning rate follows the global batch relative to 256 images; linear_warmup reaches it in 5 epochs."""
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    """Number format of the network's arithmetic; auto is bf16 where the hardware supports it, else fp32."""
    compile: Literal["auto", "never", "always"]
    """How a step is sped up: auto fuses layers on CPUs and captures CUDA graphs, always means torch.compile."""
    deterministic: bool
    """Whether a run repeats bit for bit on the same machine."""
    normalization: Literal["zerocenter", "zscore", "none"]
    """What is done to each channel: the mean is subtracted; with zscore, it is also divided by its deviation."""
    batch_norm: BatchNorm
    """Which statistics batch norms use over several devices; population is recomputed before each evaluation."""
    label_smoothing: BelowOne
    """Share of each label that is spread evenly over all classes, in [0, 1)."""
    image_scales: tuple[Share, ...]
    """Sides of the training images over the epochs, as shares of the full side in (0, 1]; empty means full size."""
    weight_averaging: BelowOne
    """Decay per step, in [0, 1), of the EMA of the weights, which is then evaluated; 0 means no EMA."""
    mirrored_evaluation: bool
    """Whether a second test accuracy is reported, from the mean logits of each image and its mirror image."""
    log_every: Count
    """Steps between two points of the live plot; the loss is read from the device only then."""
    profile: bool
    """Whether a profiler trace of a few steps is written."""
    max_seconds: PositiveFloat | None
    """Seconds from the start of the command, start-up included, after which training stops; null means no limit."""


@dataclass(frozen=True)
class Devices:
    """The devices that train, and the number of ranks."""

    __pydantic_config__: ClassVar = _CLOSED
    accelerator: Literal["auto", "cpu", "gpu", "mps"]
    """Kind of device; auto takes NVIDIA GPUs before Apple's before the CPU."""
    count: Count | Auto
    """Number of ranks (processes); auto means one per visible GPU, else one."""
    threads: Count | Auto
    """CPU threads per rank; auto: on GPUs cores / ranks; on CPUs all cores if count=auto, else 1."""
    oversubscribe: bool
    """Whether there may be more ranks than devices; such runs are left out of speedup reports."""


@dataclass(frozen=True)
class CheckpointSettings:
    """How often checkpoints are saved. The last epoch always is."""

    __pydantic_config__: ClassVar = _CLOSED
    every: Count
    """Epochs between two checkpoints."""
    keep: Count
    """Number of newest checkpoints that are kept; with data.validation the best epoch's is kept, too."""


@dataclass(frozen=True)
class EarlyStoppingSettings:
    """When training stops early, and which epoch is the best."""

    __pydantic_config__: ClassVar = _CLOSED
    patience: Count | None
    """Consecutive epochs without improvement after which training stops; null means no early stopping."""
    metric: Literal["val/loss", "val/accuracy"]
    """Metric that selects the best epoch: the lowest loss or the highest accuracy."""
    min_delta: NonNegativeFloat
    """Smallest change, in the metric's unit, that counts as an improvement."""


@dataclass(frozen=True)
class ReportSettings:
    """Extra results in a sweep's report."""

    __pydantic_config__: ClassVar = _CLOSED
    target_accuracy: Share | None
    """Validation accuracy in (0, 1] to which seconds and device-seconds are reported; null means none."""
    price_per_hour: PositiveFloat | None
    """Price of one device for an hour, in any currency; null means that no price is reported."""


@dataclass(frozen=True)
class Config:
    """The configuration of one run."""

    __pydantic_config__: ClassVar = _CLOSED
    data: Section
    """The images."""
    augment: Section
    """The augmentation of training images."""
    model: Section
    """The network."""
    optimizer: Section
    """The optimizer."""
    schedule: Section
    """The factor of the learning rate at each step."""
    launcher: Section
    """What starts the ranks."""
    tracking: Section
    """Where runs are recorded beside their folders."""
    train: Train
    """The training loop."""
    devices: Devices
    """The devices that train."""
    checkpoint: CheckpointSettings
    """How often checkpoints are saved."""
    early_stopping: EarlyStoppingSettings
    """When training stops early."""
    report: ReportSettings
    """Extra results of a sweep."""
    seed: Annotated[int, Ge(0), Le(2**63 - 1)]
    """Seed of initial weights, image order, augmentation and dropout, below 2**63."""
    resume: Name
    """Which run continues: never, latest, the folder or MLflow id of a run or sweep, or auto: the newest interrupted
    one, whose devices, launcher, tracking and checkpoint may differ."""
    progress: Literal["auto", "bar", "live", "lines", "quiet"]
    """How progress is displayed; auto is a bar on a terminal, a live line in a notebook, lines elsewhere."""
    trusted_modules: tuple[Name, ...]
    """Modules outside this package, torch and torchvision that a `_target_` may come from."""

    @property
    def validation(self) -> float:
        """Share of the training images in the validation split, in [0, 1). 0: the test set is used instead."""
        return float(self.data["validation"])


class _Data(TypedDict, total=False):
    root: Name | None
    """Folder of the images."""
    validation: Required[BelowOne]
    """Share of the training images that is held out for validation, in [0, 1); 0 means that the test set validates."""


class _Model(TypedDict, total=False):
    width: Count | None
    """Channels of the first block."""
    depth: Count | None
    """Convolutions or residual blocks per stage."""


class _Optimizer(TypedDict, total=False):
    lr: Required[PositiveFloat]
    """Learning rate for a global batch of 256 images; train.lr_scaling scales it for other sizes."""
    momentum: BelowOne | None
    """Share of the previous update in the next one, in [0, 1)."""
    weight_decay: NonNegativeFloat | None
    """Share of a weight that is subtracted per step, as a multiple of the learning rate."""


class _Schedule(TypedDict, total=False):
    drop_factor: Share | None
    """Factor on the learning rate at each drop, in (0, 1]."""
    drop_period: Count | None
    """Epochs between two drops."""
    warmup_epochs: NonNegativeFloat | None
    """Epochs in which the learning rate rises from 0 to its full value."""


class _Launcher(TypedDict, total=False):
    timeout: PositiveFloat | None
    """Seconds in which no rank sends a heartbeat (one per step or evaluated batch); then the hung rank is killed."""
    max_restarts: NonNegativeCount | None
    """Number of restarts after a rank died or hung."""
    hosts: Count | Annotated[str, StringConstraints(pattern=r"^[1-9]\d{0,3}:[1-9]\d{0,3}$")] | None
    """Number of hosts, each of which runs the same command; 1:2 means at least 1 and at most 2."""
    host_rank: NonNegativeCount | None
    """The number of this host, from 0; host 0 has the run folder and the terminal."""
    rendezvous: Name | None
    """Address and port of host 0, such as host0:29500."""
    token_file: Name | None
    """File of mode 0600 with the secret that all hosts know; null means the variable CIFAR_EXP_TOKEN."""


class _Tracking(TypedDict, total=False):
    uri: Name | None
    """Address of the MLflow store; null means MLFLOW_TRACKING_URI, else SQLite in outputs/."""
    experiment: Name | None
    """Name of the MLflow experiment; null means MLFLOW_EXPERIMENT_NAME, else cifar-exp."""
    experiment_id: Name | None
    """MLflow's id of the experiment, in place of its name; null means MLFLOW_EXPERIMENT_ID."""
    run_name: Name | None
    """Name of a single run, or of a sweep's parent run; null means MLFLOW_RUN_NAME, else one made of the settings."""
    run_id: Name | None
    """MLflow's id of an existing run that a single run or a sweep's parent run continues; null means MLFLOW_RUN_ID."""


COMMON: dict[str, Any] = {
    "data": _Data,
    "model": _Model,
    "optimizer": _Optimizer,
    "schedule": _Schedule,
    "launcher": _Launcher,
    "tracking": _Tracking,
}
