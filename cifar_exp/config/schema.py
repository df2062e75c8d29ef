"""The typed configuration: the meaning, unit and range of each setting.

These are plain dataclasses, and every module may import them. ``reading.py`` converts composed YAML to these classes
and reports wrong settings.

The sections ``train``, ``devices``, ``checkpoint``, ``early_stopping`` and ``report`` are closed: they have exactly
these keys. The other sections are open: the signature of their ``_target_`` defines their keys. ``COMMON`` has the
settings that the package's own choices of an open section share, so that a wrong value is reported before a heavy
import. ``KEPT`` has the settings of open sections that the framework uses itself and does not pass to the target.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

Count = Annotated[int, Ge(1)]
NonNegativeCount = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0), Lt(math.inf)]
NonNegativeFloat = Annotated[float, Ge(0), Lt(math.inf)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
Scale = Annotated[float, Gt(0), Le(1)]
Name = Annotated[str, MinLen(1)]
Auto = Literal["auto"]
BatchNorm = Literal["averaged", "local", "synchronized", "population"]
Section = dict[str, Any]  # an open section: `_target_` and the keywords it is called with

_CLOSED: dict[str, Any] = {"extra": "forbid"}


@dataclass(frozen=True)
class Train:
    """The training loop."""

    __pydantic_config__: ClassVar = _CLOSED
    epochs: Count = 60
    batch_size: Count = 256  # images: per device with weak scaling, global with strong scaling
    scaling: Literal["weak", "strong"] = "weak"
    accumulate: Count = 1  # gradient accumulation: micro-batches per device and step
    lr_scaling: Literal["linear", "sqrt", "none", "linear_warmup"] = "linear"  # of the learning rate with the batch
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # auto: fused layers on CPUs, captured steps (CUDA graphs) on GPUs; never: PyTorch's layers, eager steps;
    # always: torch.compile
    compile: Literal["auto", "never", "always"] = "auto"
    deterministic: bool = False
    normalization: Literal["zerocenter", "zscore", "none"] = "zerocenter"
    batch_norm: BatchNorm = "averaged"  # which statistics are used over devices
    label_smoothing: BelowOne = 0.0
    image_scales: tuple[Scale, ...] = ()  # progressive resizing: image sides over the epochs; empty: full size
    weight_averaging: BelowOne = 0.0  # decay per step of the EMA of the weights, which is evaluated; 0: no EMA
    mirrored_evaluation: bool = False  # a second test accuracy: mean logits of each image and its mirror image
    log_every: Count = 10  # steps between two points of the live plot; the loss is read from the device then
    profile: bool = False  # write a profiler trace of a few steps
    max_seconds: PositiveFloat | None = None  # time limit of the run, after which training stops and saves


@dataclass(frozen=True)
class Devices:
    """The devices that train, and the number of ranks."""

    __pydantic_config__: ClassVar = _CLOSED
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    count: Count | Auto = "auto"
    threads: Count | Auto = "auto"  # CPU threads per rank
    oversubscribe: bool = False  # allow more ranks than devices; such runs are left out of speedup reports


@dataclass(frozen=True)
class CheckpointSettings:
    """How often checkpoints are saved. The last epoch always is."""

    __pydantic_config__: ClassVar = _CLOSED
    every: Count = 1  # epochs between two checkpoints
    keep: Count = 2  # number of newest checkpoints to keep


@dataclass(frozen=True)
class EarlyStoppingSettings:
    """When training stops early, and which epoch is the best."""

    __pydantic_config__: ClassVar = _CLOSED
    patience: Count | None = None  # consecutive epochs without improvement; None: no early stopping
    metric: Literal["val/loss", "val/accuracy"] = "val/loss"
    min_delta: NonNegativeFloat = 0.0  # smallest change that counts as an improvement


@dataclass(frozen=True)
class ReportSettings:
    """Extra results in a sweep's report."""

    __pydantic_config__: ClassVar = _CLOSED
    target_accuracy: Annotated[float, Gt(0), Le(1)] | None = None  # validation accuracy to report the time to
    price_per_hour: PositiveFloat | None = None  # of one device, in any currency


@dataclass(frozen=True)
class Config:
    """The configuration of one run."""

    __pydantic_config__: ClassVar = _CLOSED
    data: Section
    augment: Section
    model: Section
    optimizer: Section
    schedule: Section
    launcher: Section
    tracking: Section
    train: Train = field(default_factory=Train)
    devices: Devices = field(default_factory=Devices)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    early_stopping: EarlyStoppingSettings = field(default_factory=EarlyStoppingSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    seed: Annotated[int, Ge(0), Le(2**63 - 1)] = 0
    resume: Name = "never"  # or auto, or the folder or MLflow id of a run or sweep
    progress: Literal["auto", "bar", "live", "lines", "quiet"] = "auto"
    trusted_modules: tuple[Name, ...] = ()

    @property
    def validation(self) -> float:
        """Fraction of the training images in the validation split, in [0, 1). 0: the test set is used instead."""
        return float(self.data.get("validation", 0.0))


@dataclass(frozen=True)
class _Data:
    root: Name | None = None
    validation: BelowOne = 0.0  # fraction of the training images in the validation split


@dataclass(frozen=True)
class _Model:
    width: Count | None = None
    depth: Count | None = None


@dataclass(frozen=True)
class _Optimizer:
    lr: PositiveFloat  # for a global batch of 256 images; train.lr_scaling scales it for other sizes
    momentum: BelowOne | None = None
    weight_decay: NonNegativeFloat | None = None


@dataclass(frozen=True)
class _Schedule:
    drop_factor: PositiveFloat | None = None
    drop_period: Count | None = None  # epochs
    warmup_epochs: NonNegativeFloat | None = None


@dataclass(frozen=True)
class _Launcher:
    timeout: PositiveFloat | None = None  # seconds
    max_restarts: NonNegativeCount | None = None


@dataclass(frozen=True)
class _Tracking:
    uri: Name | None = None
    experiment: Name | None = None


COMMON: dict[str, type] = {
    "data": _Data,
    "model": _Model,
    "optimizer": _Optimizer,
    "schedule": _Schedule,
    "launcher": _Launcher,
    "tracking": _Tracking,
}

KEPT: dict[str, set[str]] = {"data": {"validation"}}
