"""A checkpoint is saved when it is due, with its position in the run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cifar_exp.data.image_reader import Preprocessing
from cifar_exp.distributed.process_group import World
from cifar_exp.records.checkpoint import Checkpoint, CheckpointPosition
from cifar_exp.worker.checkpoint_policy import CheckpointPolicy, RankZeroFiles
from cifar_exp.worker.training_setup import TrainingSetup
from tests.helpers.tiny_training import train_batches, trainer, validation


class Disk:
    """Stands in for the journal and the saver, and lists what they are asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.saved: list[tuple[Checkpoint, CheckpointPosition]] = []

    def sync(self) -> None:
        self.calls.append("sync")

    def save(self, checkpoint: Checkpoint, position: CheckpointPosition) -> None:
        self.calls.append("save")
        self.saved.append((checkpoint, position))

    def wait(self) -> None:
        self.calls.append("wait")


def policy(world: World, folder: Path, disk: Disk | None, *, every: int = 2, split: bool = True) -> CheckpointPolicy:
    made, model, _ = trainer(world)
    rule = Preprocessing((32, 32))
    data = SimpleNamespace(classes=("cat", "dog"), image_size=(32, 32), content_hash="data", preprocessing=rule)
    job: Any = SimpleNamespace(
        checkpoint=SimpleNamespace(every=every),
        data=data,
        plan=SimpleNamespace(global_batch_size=16),
        config_hash="config",
        started=0.0,
        run_dir=folder,
    )
    files: Any = RankZeroFiles(disk, disk) if disk else None  # type: ignore[arg-type]
    test = validation(world)
    return CheckpointPolicy(job, world, TrainingSetup(model, made, train_batches(world), test), test, split, files)


def after(made: CheckpointPolicy, epoch: int, best_epoch: int) -> None:
    """As if training were at the end of ``epoch``, three steps each."""
    progress = made.setup.trainer
    progress.epoch, progress.step = epoch, 3 * epoch
    progress.early_stopping.best_step, progress.early_stopping.best = 3 * best_epoch, 0.5


@pytest.mark.parametrize(
    ("epoch", "best_epoch", "must", "split", "saved"),
    [
        (1, 0, False, True, False),
        (2, 0, False, True, True),  # checkpoint.every=2
        (3, 3, False, True, True),  # the best one
        (3, 3, False, False, False),  # by the test set, which chooses nothing
        (3, 1, True, True, True),  # the last one
    ],
)
def test_when_a_checkpoint_is_saved(
    only_rank: World, tmp_path: Path, epoch: int, best_epoch: int, must: bool, split: bool, saved: bool
) -> None:
    disk = Disk()
    made = policy(only_rank, tmp_path, disk, split=split)
    after(made, epoch, best_epoch)
    made.save(must)
    # The journal is on disk first. Where nothing is saved, a save that failed before is noticed.
    assert disk.calls == (["sync", "save"] if saved else ["wait"])


def test_checkpoint_has_step_epoch_and_config_hash(only_rank: World, tmp_path: Path) -> None:
    disk = Disk()
    made = policy(only_rank, tmp_path, disk, every=1)
    after(made, epoch=4, best_epoch=3)
    made.save(must=False)
    ((checkpoint, position),) = disk.saved
    assert (position.epoch, position.step, position.best_step, position.best_value) == (4, 12, 9, 0.5)
    assert (position.global_batch_size, position.world_size, position.data_hash, position.config_hash) == (
        16,
        1,
        "data",
        "config",
    )
    assert (checkpoint.classes, checkpoint.image_size, checkpoint.shift) == (("cat", "dog"), (32, 32), (128, 127, 126))
    for name, value in made.setup.model.state_dict().items():
        assert torch.equal(checkpoint.model[name], value)
        assert torch.equal(checkpoint.trained[name], value)
    assert (checkpoint.training["epoch"], checkpoint.training["step"]) == (4, 12)


def test_other_ranks_write_nothing(only_rank: World, tmp_path: Path) -> None:
    made = policy(only_rank, tmp_path, None)
    after(made, epoch=1, best_epoch=0)
    made.save(must=False)
    made.save(must=True)
    made.wait()
    assert list(tmp_path.iterdir()) == []
