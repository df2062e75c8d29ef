"""The job: all that a rank is told."""

from dataclasses import dataclass
from pathlib import Path

from cifar_exp.config.schema import Checkpoint as CheckpointSettings
from cifar_exp.config.schema import EarlyStopping as EarlyStoppingSettings
from cifar_exp.config.schema import Train
from cifar_exp.data.augment import Augmentation
from cifar_exp.data.dataset_files import DatasetFiles
from cifar_exp.models.networks import ModelFactory
from cifar_exp.records.checkpoint import Manifest
from cifar_exp.training.optimizers import OptimizerFactory
from cifar_exp.training.plan import Plan


@dataclass(frozen=True)
class Job:
    """All that a rank is told: one plain, picklable object.

    Attributes:
        run_dir: the run's folder, where rank 0 writes.
        started: when the run began, on the monotonic clock, which nobody sets; time between its sessions left out.
        elapsed: seconds the run took in earlier sessions; 0 in a new run.
        config_hash: of the settings that bear on the result.
        resume_from: folder of the run and its checkpoint to go on from; None starts from initial values.
        seed: of initial values, order and augmentation.
        plan: batches, steps and learning rates.
        train: the training loop's settings.
        checkpoint: how often the state is saved, and how much of it stays.
        early_stopping: when training ends before its last epoch, and which epoch is the best.
        data: the images on disk.
        augmentation: of training images.
        make_model: called with ``num_classes``.
        make_optimizer: called with the parameters and ``lr``.
        accelerator: ``cpu``, ``gpu`` or ``mps``.
        threads: CPU threads of this rank.
        timeout: seconds without a sign of life after which the launcher takes a rank for hung.
    """

    run_dir: Path
    started: float
    elapsed: float
    config_hash: str
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
