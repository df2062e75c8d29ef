"""`cifar-exp sync`: deliver runs from disk to MLflow, after an outage or a crash."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cifar_exp.cli.words import settings_in
from cifar_exp.errors import CifarExpError, ConfigError, StorageError
from cifar_exp.records.find_run import find_folder
from cifar_exp.records.run_folder import CONFIG_FILE, MULTIRUN_FILE, RUN_FILE, SWEEP_RUN_FILE, RunInfo, is_claimed
from cifar_exp.system.redaction import masked_text
from cifar_exp.system.surroundings import settle
from cifar_exp.tracking.mlflow_tracker import MLflowTracker

SETTINGS = ("tracking.uri", "tracking.experiment")


@click.command("sync")
@click.argument("words", nargs=-1, required=True, metavar="FOLDER...")
def command(words: tuple[str, ...]) -> int:
    """Deliver runs from disk to MLflow, after an outage or a crash.

    FOLDER is the folder of a run or a sweep, or a folder of several. The params, tags, metrics, files and status of
    each run are delivered; points that MLflow already has are not sent again. If a run fails, the others are still
    delivered, and the exit code is that of the first failure.

    \b
    tracking.uri=<address>      another store than that of the run, or the same one with its password, which the run
                                folder does not store
    tracking.experiment=<name>  another experiment
    """
    settle()
    typed, folders = settings_in(words, SETTINGS)
    settings = {name.partition(".")[2]: None if value == "null" else value for name, value in typed.items()}
    failures: list[CifarExpError] = []
    try:
        for word in folders:
            failures += _deliver_all(_folder(word), settings)
    except CifarExpError as error:
        failures.append(error)
    for failure in failures:
        print(f"cifar-exp: {masked_text(str(failure))}", file=sys.stderr)
    return failures[0].exit_code if failures else 0


def _folder(word: str) -> Path:
    """The folder ``word`` if it exists, else the folder of the run ``word``: an MLflow id or ``latest``."""
    return Path(word) if Path(word).is_dir() else find_folder(word, RUN_FILE) or find_folder(word) or Path(word)


def _deliver_all(folder: Path, settings: Mapping[str, str | None]) -> list[CifarExpError]:
    """Deliver the runs in ``folder`` and print a line for each. Returns the errors."""
    failures: list[CifarExpError] = []
    for run_dir in runs_in(folder):
        try:
            print(tracker_of(run_dir, settings).deliver(run_dir), flush=True)
        except CifarExpError as error:
            failures.append(error)
    return failures


def runs_in(folder: Path) -> list[Path]:
    """Find the folders of all runs in ``folder``, then those of their sweeps.

    Raises:
        ConfigError: there is no run and no sweep.
    """
    runs = sorted(path.parent for path in folder.rglob(RUN_FILE))
    sweeps = {path.parent.resolve(): path.parent for path in folder.rglob(SWEEP_RUN_FILE)}
    if not runs and not sweeps:
        raise ConfigError(f"{folder}: there is no run in this folder. Give the folder of a run or a sweep")
    for run_dir in runs:
        with suppress(StorageError):  # reported when the run is delivered
            sweep_dir = RunInfo.load(run_dir).sweep_dir
            # A running sweep closes its parent run itself.
            if sweep_dir and (sweep_dir / SWEEP_RUN_FILE).exists() and not is_claimed(sweep_dir):
                sweeps.setdefault(sweep_dir.resolve(), sweep_dir)
    return [*runs, *(path for _, path in sorted(sweeps.items()))]


def tracker_of(run_dir: Path, settings: Mapping[str, str | None]) -> MLflowTracker:
    """The tracker for a run. The folder may be untrusted: only the store's address and experiment are read from it.

    Args:
        run_dir: the folder of a run or a sweep.
        settings: ``uri`` and ``experiment`` that replace those of the run.

    Raises:
        ConfigError: the run has no MLflow store and ``settings`` have no ``uri``.
        StorageError: the run's configuration cannot be read.
    """
    path = next((path for path in (run_dir / CONFIG_FILE, run_dir / MULTIRUN_FILE) if path.exists()), run_dir)
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise StorageError(f"{path}: the run's configuration cannot be read: {error}. Restore that file") from error
    section = content.get("tracking") if isinstance(content, dict) else None
    if not isinstance(section, dict) or not isinstance(section.get("_target_"), str):
        raise StorageError(f"{path}: the run's configuration cannot be read: it names no tracker. Restore that file")
    saved = {name: section.get(name) for name in ("uri", "experiment")}
    is_tracked = section["_target_"].endswith(".MLflowTracker")
    if not is_tracked and "uri" not in settings:
        raise ConfigError(
            f"{run_dir}: the run has no MLflow store (tracking={section['_target_']}). Run "
            f"cifar-exp sync {run_dir} tracking.uri=<address>"
        )
    chosen = {name: value for name, value in saved.items() if value} | dict(settings)
    return MLflowTracker(**chosen)
