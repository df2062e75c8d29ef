"""Deliver data that is on disk but missing in the MLflow store, after an outage or a crash."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from cifar_exp.errors import CifarExpError, ConfigError, StorageError
from cifar_exp.records.folder_check import check_folder
from cifar_exp.records.run_folder import RUN_FILE, SWEEP_RUN_FILE, RunInfo, is_locked
from cifar_exp.system.bugs import BugError
from cifar_exp.system.printable import printable, printable_text
from cifar_exp.tracking.copies import copier_of
from cifar_exp.tracking.mlflow_tracker import MLflowTracker
from cifar_exp.tracking.own_store import own_address, stored_tracking


def deliver_all(folder: Path, settings: Mapping[str, str | None], to: str | None = None) -> list[CifarExpError]:
    """Deliver the runs in ``folder`` and print a line for each. Returns the failures.

    Args:
        folder: of a run, a sweep or many runs.
        settings: typed settings of ``tracking``.
        to: the address of another store to copy the runs to; None delivers to their own.
    """
    failures: list[CifarExpError] = []
    for run_dir in runs_in(folder):
        try:
            copier = copier_of(run_dir, to, settings.get("experiment")) if to else tracker_of(run_dir, settings)
            print(printable_text(copier.deliver(run_dir)), flush=True)
        except CifarExpError as error:
            failures.append(error)
        except Exception as error:  # continue with the other runs
            failures.append(BugError(error, f"{run_dir}: "))
    return failures


def runs_in(folder: Path) -> list[Path]:
    """The folders of all runs in ``folder``, then of the sweeps that they belong to.

    Raises:
        ConfigError: the folder has no runs.
    """
    runs = sorted(path.parent for path in folder.rglob(RUN_FILE))
    sweeps = {path.parent.resolve(): path.parent for path in folder.rglob(SWEEP_RUN_FILE)}
    if not runs and not sweeps:
        raise ConfigError(f"{folder}: there is no run in this folder. Give the folder of a run or a sweep")
    for run_dir in runs:
        with suppress(StorageError):  # reported when this run is delivered
            sweep_dir = RunInfo.load(run_dir).sweep_dir
            # A sweep that is still running closes its parent run itself.
            if sweep_dir and (sweep_dir / SWEEP_RUN_FILE).exists() and not is_locked(sweep_dir):
                sweeps.setdefault(sweep_dir.resolve(), sweep_dir)
    return [*runs, *(path for _, path in sorted(sweeps.items()))]


def tracker_of(run_dir: Path, settings: Mapping[str, str | None]) -> MLflowTracker:
    """The store that a run's folder names, if it is the user's own, unless ``settings`` name another.

    Other settings in the folder are ignored: it may be untrusted.

    Raises:
        ConfigError: if the run has tracking switched off, or its store may be another user's and no store was
            typed.
        StorageError: where its configuration cannot be read.
    """
    check_folder(run_dir)
    section = stored_tracking(run_dir)
    saved = {name: section.get(name) for name in ("uri", "experiment", "experiment_id")}
    if "experiment" in settings:
        del saved["experiment_id"]
    is_tracked = section["_target_"].endswith(".MLflowTracker")
    if not is_tracked and "uri" not in settings:
        raise ConfigError(
            f"{run_dir}: the run has no MLflow store (tracking={printable(section['_target_'])}). Run "
            f"cifar-exp sync {run_dir} tracking.uri=<address>"
        )
    if "uri" not in settings:
        saved["uri"] = own_address(saved["uri"], run_dir)
    chosen = {name: value for name, value in saved.items() if value} | dict(settings)
    return MLflowTracker(**chosen)
