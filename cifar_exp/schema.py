"""The typed configuration: what each setting is, its unit and its range.

A leaf that everything may import: plain dataclasses, no third-party import but the range markers. ``config.py``
turns composed YAML into these classes and reports what does not fit. Sections whose content depends on a
``_target_`` (data, augment, model, optimizer, schedule) name only the settings that this package's own choices
share; a choice may add others, which are checked against its signature.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MinLen

Count = Annotated[int, Ge(1)]
PositiveFloat = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Name = Annotated[str, MinLen(1)]
Auto = Literal["auto"]


@dataclass
class Train:
    """The training loop."""

    epochs: Count = 60
    batch_size: Count = 256  # images a device under weak scaling, images in all under strong scaling
    scaling: Literal["weak", "strong"] = "weak"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["auto", "never", "always"] = "auto"
    deterministic: bool = False
    log_every: Count = 10  # steps between two reads of the loss, and between two points of the live plot
    label_smoothing: Annotated[float, Ge(0), Le(1)] = 0.0


@dataclass
class Devices:
    """Which processors train, and how many ranks share them."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    count: Count | Auto = "auto"
    threads: Count | Auto = "auto"  # CPU threads a rank
    oversubscribe: bool = False  # allow more ranks than devices; such runs are never counted as speedup


@dataclass
class Launcher:
    """How ranks are started and watched."""

    kind: Literal["elastic"] = "elastic"
    timeout: PositiveFloat = 600.0  # seconds a collective operation may wait for the slowest rank


@dataclass
class Tracking:
    """Where runs are recorded. ``uri`` and ``experiment`` are MLflow's."""

    backend: Literal["mlflow", "none"] = "mlflow"
    uri: str | None = None  # None: SQLite under outputs/
    experiment: Name = "cifar-exp"


@dataclass
class Checkpoint:
    """What is kept in the run's folder."""

    every: Count = 1  # epochs


@dataclass
class Data:
    """Which images. Further keys belong to the chosen ``_target_``."""

    root: str = "data"


@dataclass
class Model:
    """Which network. Further keys belong to the chosen ``_target_``."""

    width: Count | None = None
    depth: Count | None = None


@dataclass
class Optimizer:
    """Which update rule. Further keys belong to the chosen ``_target_``."""

    lr: PositiveFloat = 0.1  # for a global batch of 256 images
    momentum: Annotated[float, Ge(0), Le(1)] | None = None
    weight_decay: Annotated[float, Ge(0)] | None = None


@dataclass
class Schedule:
    """How the learning rate moves. Further keys belong to the chosen ``_target_``."""

    drop_factor: PositiveFloat | None = None
    drop_period: Count | None = None  # epochs
    warmup_epochs: Annotated[float, Ge(0)] | None = None


@dataclass
class Config:
    """One run, whole. ``extra`` keys of the open sections are kept beside it by ``config.py``."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    augment: dict[str, Any] = field(default_factory=dict)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    devices: Devices = field(default_factory=Devices)
    launcher: Launcher = field(default_factory=Launcher)
    tracking: Tracking = field(default_factory=Tracking)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    seed: Annotated[int, Ge(0), Le(2**63 - 1)] = 0
    progress: Literal["auto", "bar", "lines", "quiet"] = "auto"
    trusted_modules: list[Name] = field(default_factory=list)
