"""When a rank saves a checkpoint, and what goes into it."""

import time
from dataclasses import dataclass

from cifar_exp.data.batches import EvaluationBatches, scaled_size
from cifar_exp.distributed.process_group import World
from cifar_exp.records.checkpoint import Checkpoint, CheckpointPosition
from cifar_exp.records.checkpoint_saver import CheckpointSaver
from cifar_exp.records.journal import JournalWriter, run_id
from cifar_exp.worker.job import Job
from cifar_exp.worker.training_setup import TrainingSetup


@dataclass
class RankZeroFiles:
    """The journal and the checkpoints, which rank 0 writes."""

    journal: JournalWriter
    saver: CheckpointSaver


@dataclass
class CheckpointPolicy:
    """Saves checkpoints during training. Its methods are called on every rank; rank 0 writes.

    Attributes:
        job: the run.
        world: this rank among the others.
        setup: what is saved.
        validation: the images on which each epoch is validated.
        has_validation_split: whether ``validation`` is a validation split. If it is the test set, no best checkpoint is
            kept.
        files: what rank 0 writes to; None on the other ranks.
    """

    job: Job
    world: World
    setup: TrainingSetup
    validation: EvaluationBatches
    has_validation_split: bool
    files: RankZeroFiles | None

    def save(self, must: bool) -> None:
        """Save a checkpoint if it is due. It is due after every ``checkpoint.every`` epochs and after the best epoch.

        ``must``: save in any case.

        Raises:
            StorageError: an earlier checkpoint could not be written.
        """
        trainer = self.setup.trainer
        is_best = self._best()[0] == trainer.step
        if not (must or trainer.epoch % self.job.checkpoint.every == 0 or is_best):
            self.wait()  # reports a failed save at the next epoch, not when the next checkpoint is due
            return
        training = trainer.state_dict()  # a collective
        if self.files:
            network = self.setup.model.state_dict()
            normalization = self.setup.batches.normalization
            checkpoint = Checkpoint(
                model=trainer.evaluated.state_dict(),
                trained=network,
                training=training,
                classes=self.job.data.classes,
                shift=normalization.shift,
                scale=normalization.scale,
                image_size=scaled_size(self.job.data.image_size, self.validation.scale),
                preprocessing=self.job.data.preprocessing.stored(),
            )
            position = self._position()
            self.files.journal.sync()  # a checkpoint on disk implies the journal lines of its steps
            self.files.saver.save(checkpoint, position)

    def wait(self) -> None:
        """Wait until all checkpoints are on disk.

        Raises:
            StorageError: one could not be written.
        """
        if self.files:
            self.files.saver.wait()

    def _best(self) -> tuple[int | None, float | None]:
        """Step and value of the best epoch so far; None without a validation split."""
        progress = self.setup.trainer.early_stopping
        return (progress.best_step, progress.best) if self.has_validation_split else (None, None)

    def _position(self) -> CheckpointPosition:
        trainer = self.setup.trainer
        best_step, best_value = self._best()
        return CheckpointPosition(
            epoch=trainer.epoch,
            step=trainer.step,
            global_batch_size=self.job.plan.global_batch_size,
            world_size=self.world.size,
            data_hash=self.job.data.content_hash,
            config_hash=self.job.config_hash,
            seconds=time.monotonic() - self.job.started,
            best_step=best_step,
            best_value=best_value,
            run_id=run_id(self.job.run_dir),
        )
