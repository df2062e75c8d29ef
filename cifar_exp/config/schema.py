"""The typed configuration: what each setting is, its unit and its range.

A leaf that everything may import: plain dataclasses, no third-party import but the range markers. ``config.py`` turns
composed YAML into these classes and reports what does not fit.

``train``, ``devices``, ``checkpoint`` and ``early_stopping`` are closed: they have these keys and no others. The other
sections are open: each belongs to its ``_target_``, whose signature says what it takes; the classes of ``COMMON`` hold
the settings that this package's own choices share, so that a wrong one is reported before anything heavy is imported.
``KEPT`` are settings of open sections that the framework answers itself: their targets do not see them.
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
    batch_size: Count = 256  # images: a device's under weak scaling, the global batch under strong scaling
    scaling: Literal["weak", "strong"] = "weak"
    accumulate: Count = 1  # micro-batches a device and step: the gradients of as many devices, one after the other
    lr_scaling: Literal["linear", "sqrt", "none", "linear_warmup"] = "linear"  # of the rate with the global batch
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["auto", "never", "always"] = "auto"
    deterministic: bool = False
    normalization: Literal["zerocenter", "zscore", "none"] = "zerocenter"
    batch_norm: BatchNorm = "averaged"  # whose statistics layers normalise by, and what is evaluated with
    label_smoothing: BelowOne = 0.0
    image_scales: tuple[Scale, ...] = ()  # sides of images, over the epochs; none: all at full size
    weight_averaging: BelowOne = 0.0  # decay a step of the running mean of the weights that is evaluated; 0: none
    mirrored_evaluation: bool = False  # a second test accuracy, of each image's and its mirror image's mean logits
    log_every: Count = 10  # steps between two reads of the loss, which are the points of the live plot
    profile: bool = False  # write a trace of a few steps
    max_seconds: PositiveFloat | None = None  # of the run, after which training finishes where it is


@dataclass(frozen=True)
class Devices:
    """Which processors train, and how many ranks share them."""

    __pydantic_config__: ClassVar = _CLOSED
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    count: Count | Auto = "auto"
    threads: Count | Auto = "auto"  # CPU threads a rank
    oversubscribe: bool = False  # allow more ranks than devices; never counted as speedup


@dataclass(frozen=True)
class CheckpointSettings:
    """What is kept of a run to go on from; the last epoch's checkpoint always is."""

    __pydantic_config__: ClassVar = _CLOSED
    every: Count = 1  # epochs
    keep: Count = 2  # the newest ones


@dataclass(frozen=True)
class EarlyStoppingSettings:
    """When training ends before its last epoch, and which epoch is the best."""

    __pydantic_config__: ClassVar = _CLOSED
    patience: Count | None = None  # epochs in a row without a better value; None: all epochs are trained
    metric: Literal["val/loss", "val/accuracy"] = "val/loss"
    min_delta: NonNegativeFloat = 0.0  # a value is better where it is so by more than this


@dataclass(frozen=True)
class ReportSettings:
    """What a sweep's report works out beside the speedup."""

    __pydantic_config__: ClassVar = _CLOSED
    target_accuracy: Annotated[float, Gt(0), Le(1)] | None = None  # of validation: what it took to reach it
    price_per_hour: PositiveFloat | None = None  # of one device, in any currency


@dataclass(frozen=True)
class Config:
    """One run, whole."""

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
    resume: Name = "never"  # or auto, or the folder or MLflow id of a run
    progress: Literal["auto", "bar", "live", "lines", "quiet"] = "auto"
    trusted_modules: tuple[Name, ...] = ()

    @property
    def validation(self) -> float:
        """Share of the training images that is kept apart to validate on; 0 validates on the test set."""
        return float(self.data.get("validation", 0.0))


@dataclass(frozen=True)
class _Data:
    root: Name | None = None
    validation: BelowOne = 0.0  # share of the training images


@dataclass(frozen=True)
class _Model:
    width: Count | None = None
    depth: Count | None = None


@dataclass(frozen=True)
class _Optimizer:
    lr: PositiveFloat  # for a global batch of 256 images; train.lr_scaling says what others get
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
