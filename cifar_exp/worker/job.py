"""The job: everything that a rank gets from the parent process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_exp.config.schema import CheckpointSettings, EarlyStoppingSettings, Train
from cifar_exp.data.augment import Augmentation
from cifar_exp.data.dataset_files import DatasetFiles
from cifar_exp.distributed.host_place import HostPlace
from cifar_exp.models.build import ModelFactory
from cifar_exp.records.checkpoint import Manifest
from cifar_exp.training.optimizers import OptimizerFactory
from cifar_exp.training.plan import Plan


@dataclass(frozen=True)
class Job:
    """Everything that a rank gets: one plain, picklable object.

    Attributes:
        run_dir: the run folder, where rank 0 writes.
        started: start of the run on the monotonic clock, shifted so that ``now - started`` leaves out interruptions.
        elapsed: seconds that the run took in earlier sessions; 0 in a new run.
        config_hash: hash of the settings that affect the result.
        settings: these settings by their dotted names, in JSON's types.
        resume_from: run folder and checkpoint to resume from; None starts from initial values.
        seed: seed of initial weights, image order, augmentation and dropout.
        plan: batches, steps and learning rates.
        train: settings of the training loop.
        checkpoint: how often a checkpoint is saved, and how many are kept.
        early_stopping: when training ends before its last epoch, and which epoch is the best.
        data: the images on disk.
        augmentation: augmentation of training images.
        make_model: called with ``num_classes``.
        make_optimizer: called with the parameters and ``lr``.
        accelerator: ``cpu``, ``gpu`` or ``mps``.
        threads: CPU threads per rank.
        timeout: seconds in which no rank sends a heartbeat (one per step or evaluated batch); then the hung rank is
            killed.
        has_unused: whether some parameters got no gradient when the parent tried the network.
        overrides: the overrides from which the configuration was composed.
        place: this host, if the run has several.
    """

    run_dir: Path
    started: float
    elapsed: float
    config_hash: str
    settings: dict[str, Any]
    resume_from: tuple[Path, Manifest] | None
    seed: int
    plan: Plan
    train: Train
    checkpoint: CheckpointSettings
    early_stopping: EarlyStoppingSettings
    data: DatasetFiles
    augmentation: Augmentation
    make_model: ModelFactory
    make_optimizer: OptimizerFactory
    accelerator: str
    threads: int
    timeout: float
    has_unused: bool = False
    overrides: tuple[str, ...] = ()
    place: HostPlace | None = None
