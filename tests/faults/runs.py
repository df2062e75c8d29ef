"""The run that faults are injected into, and checks of its journal, weights and MLflow run."""

import sqlite3
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cifar_exp.records import checkpoint, journal
from tests.conftest import TINY
from tests.faults.scene import Ended, Scene, check_exit
from tests.helpers.runs import curve

# Two ranks of a tiny network, float32 and deterministic: six steps an epoch, a checkpoint after each.
SETTINGS = (
    *TINY,
    *("model._target_=tests.faults.injected.model", "data._target_=tests.faults.injected.synthetic"),
    *("trusted_modules=[tests]", "train.deterministic=true", "train.precision=fp32", "train.batch_size=8"),
    *("devices.count=2", "devices.oversubscribe=true", "progress=quiet", "checkpoint.keep=3"),
)
HERE = ("hydra.run.dir=run", "resume=auto")  # every start resumes the run in this folder
UNTRACKED = ("tracking=none",)
EPOCHS_A_TRY = 8  # per fault in an interrupted run


def settings(epochs: int, *changes: str) -> tuple[str, ...]:
    """The settings of a run of ``epochs`` epochs."""
    return (*SETTINGS, f"train.epochs={epochs}", *changes)


def reference(scene: Scene, run: Sequence[str]) -> Path:
    """The folder of the same run, uninterrupted. It is trained once for all cases."""
    key = tuple(run)
    if key not in scene.suite.references:
        where = Scene(scene.suite.base / f"reference-{next(scene.suite.numbers)}", scene.suite, "reference", 1)
        check_exit(where.run(*run, *UNTRACKED, "hydra.run.dir=run"), 0)
        scene.suite.references[key] = where.folder / "run"
    return scene.suite.references[key]


def assert_same_as_uninterrupted(scene: Scene, run: Sequence[str], run_dir: str = "run") -> None:
    """Check that losses, accuracies and weights equal the uninterrupted run's, bit for bit, at the same steps."""
    whole, mine = reference(scene, run), scene.folder / run_dir
    entries = journal.read(mine)
    assert curve(entries) == curve(journal.read(whole)), "the curve differs from the uninterrupted run's"
    expected, found = weights(whole), weights(mine)
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different, f"weights differ from the uninterrupted run's: {different}"


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The weights in the newest checkpoint, which must be intact."""
    warnings: list[str] = []
    saved = checkpoint.newest(run_dir, warnings.append)
    assert not warnings, warnings
    return dict(saved.model)


def statuses(scene: Scene, database: str = "outputs/mlflow.db") -> list[str]:
    """The status of every MLflow run, by start time."""
    return [status for (status,) in rows(scene, "SELECT status FROM runs ORDER BY start_time", database)]


def check_exit_and_sync(
    scene: Scene, ended: Ended, code: int, *words: str, run_dir: str = "run", traceback: bool = False
) -> None:
    """Check a tracked command's exit code and message.

    On a very busy machine the store may be slower than the time limit at the end of a run. The message then names a
    `cifar-exp sync` command, which is run here.
    """
    undelivered = f"cifar-exp sync {run_dir}{chr(10)}" in ended.err
    check_exit(ended, 5 if undelivered and code == 0 else code, *words, traceback=traceback)
    if undelivered:
        check_exit(scene.run("sync", run_dir), 0)


def check_exit_and_status(
    scene: Scene, ended: Ended, code: int, status: str, *words: str, traceback: bool = False
) -> None:
    """Check exit code and message, and the MLflow status of the scene's only run."""
    check_exit_and_sync(scene, ended, code, *words, traceback=traceback)
    assert statuses(scene) == [status], (statuses(scene), ended.err)


def assert_recorded_once(scene: Scene, run_dir: str = "run", database: str = "outputs/mlflow.db") -> None:
    """Check that MLflow has every point of the run's journal once, and no other points."""
    identity = (scene.folder / run_dir / "mlflow_run_id").read_text().strip()
    found = Counter(rows(scene, f"SELECT key, step FROM metrics WHERE run_uuid = '{identity}'", database))
    entries = journal.read(scene.folder / run_dir)
    expected = Counter((name, entry.step) for entry in entries for name in entry.metrics)
    lost, more = (expected - found).total(), (found - expected).total()
    assert found == expected, f"of {expected.total()} points {lost} are lost; {more} points are not in the journal"


def rows(scene: Scene, query: str, database: str = "outputs/mlflow.db") -> list[Any]:
    """The result of a query to an SQLite store."""
    path = scene.folder / database
    if not path.exists():
        return []
    connection = sqlite3.connect(path, timeout=60)
    try:
        return list(connection.execute(query))
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):
            raise
        return []  # the store is being created
    finally:
        connection.close()
