"""The report of one sweep, and of two sweeps compared, from their folders or from MLflow."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from cifar_exp.config.schema import ReportSettings
from cifar_exp.errors import ConfigError, StorageError
from cifar_exp.records.find_run import find_runs
from cifar_exp.records.run_folder import RUN_FILE, SWEEP_RUN_FILE, Outcome, RunInfo
from cifar_exp.records.stored_facts import reason
from cifar_exp.study.comparison import Comparison
from cifar_exp.study.finished_runs import FinishedRun, finished_runs
from cifar_exp.study.speedup_study import Study

_SETTINGS = TypeAdapter(ReportSettings)


def sweep_report(sweep: str, uri: str | None, target_accuracy: float | None, price_per_hour: float | None) -> Study:
    """The study of a sweep.

    Args:
        sweep: its folder, its MLflow run id, or ``latest``.
        uri: address of the MLflow store; None: the one under ``outputs/``.
        target_accuracy: replaces the sweep's ``report.target_accuracy``.
        price_per_hour: replaces the sweep's ``report.price_per_hour``.

    Raises:
        ConfigError: the sweep has no finished runs with two device counts.
    """
    runs = finished_runs(sweep, uri)
    settings = report_settings(runs, target_accuracy, price_per_hour)
    return _study(sweep, runs, settings)


def compared_sweeps(sweeps: Sequence[str], uri: str | None) -> Comparison:
    """Compare two sweeps. Each is named as for :func:`sweep_report`."""
    return _comparison(sweeps, [finished_runs(sweep, uri) for sweep in sweeps])


def report_settings(
    runs: Sequence[FinishedRun], target_accuracy: float | None, price_per_hour: float | None
) -> ReportSettings:
    """The report settings of the command line, else those of the sweep."""
    given = runs[0].params if runs else {}
    typed = {"target_accuracy": target_accuracy, "price_per_hour": price_per_hour}
    values = {name: given.get(f"report.{name}") if value is None else value for name, value in typed.items()}
    try:
        return _SETTINGS.validate_python({name: None if value == "None" else value for name, value in values.items()})
    except ValidationError as error:  # the sweep may be somebody else's
        raise StorageError(
            f"the settings of the sweep: report.{reason(error)}. Set report.target_accuracy=<0 to 1> and "
            f"report.price_per_hour=<price>"
        ) from error


def _study(sweep: str, runs: Sequence[FinishedRun], settings: ReportSettings) -> Study:
    study = Study.of(runs, settings, _unfinished(find_runs(sweep, SWEEP_RUN_FILE)))
    if study is None:
        raise ConfigError(
            f"{sweep}: a speedup needs finished runs with at least two device counts, found {len(runs)} run(s). Run "
            f"cifar-exp -m experiment=speedup devices.count=1,2"
        )
    return study


def _unfinished(folder: Path) -> list[str]:
    """The jobs of the sweep in ``folder`` that are not finished."""
    jobs = []
    for path in sorted(folder.rglob(RUN_FILE)) if folder.is_dir() else ():
        outcome = Outcome.of(path.parent)
        if outcome is None or outcome.status != "FINISHED":
            overrides = RunInfo.load(path.parent).tags.get("overrides", path.parent.name)
            jobs.append(f"{overrides}: {outcome.status if outcome else 'not finished'}")
    return jobs


def _comparison(sweeps: Sequence[str], runs: Sequence[Sequence[FinishedRun]]) -> Comparison:
    first, second = (Path(sweep).name[:20] for sweep in sweeps)
    names = (f"A: {first}", f"B: {second}")
    return Comparison.of(names, *runs)
