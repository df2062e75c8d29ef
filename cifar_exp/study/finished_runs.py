"""Finished runs, from the MLflow store or from their folders."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_exp.config.mlflow_settings import from_environment
from cifar_exp.config.result_settings import HOSTS, distinguishes_groups
from cifar_exp.config.stored import stored_params
from cifar_exp.errors import ConfigError, StorageError
from cifar_exp.records import journal
from cifar_exp.records.find_run import find_runs
from cifar_exp.records.folder_check import check_folder
from cifar_exp.records.journal import run_id
from cifar_exp.records.run_folder import RUN_FILE, SWEEP_RUN_FILE, RunInfo
from cifar_exp.study.run_result import RunResult, Sample
from cifar_exp.study.time_breakdown import Breakdown
from cifar_exp.system import load_watch, machine
from cifar_exp.system.printable import printable
from cifar_exp.system.redaction import masked_text
from cifar_exp.tracking.mlflow_tracker import MLflowTracker
from cifar_exp.tracking.store_problems import store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


def grouped(overrides: Sequence[Sequence[str]]) -> list[str]:
    """The group of each job of a sweep, named by its distinguishing values other than device count and seed.

    Args:
        overrides: the overrides of each job, as in ``["train.scaling=strong", "devices.count=2", "seed=0"]``.

    Returns:
        A name for each job, such as ``strong``, or ``2 hosts``; empty if nothing else differs.
    """
    rest = [[text for text in job if distinguishes_groups(text.split("=")[0].lstrip("+"))] for job in overrides]
    common = set.intersection(*(set(job) for job in rest)) if rest else set()
    return [" ".join(_short_name(override) for override in job if override not in common) for job in rest]


def _short_name(override: str) -> str:
    name, _, value = override.partition("=")
    return f"{value} host{'s' if value != '1' else ''}" if name.lstrip("+") == HOSTS else value


OVERRIDE_START = re.compile(r" (?=[+~]*[\w./@]+=)")  # splits a job's overrides
SERIES = ("step/images_per_second", "val/accuracy")  # metrics of which a study needs all values, not only the last one


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, from MLflow or from its folder.

    Attributes:
        tags: of the run.
        metrics: the last value of each metric.
        series: all values of the metrics in ``SERIES``.
        params: the resolved configuration, flattened; as text if it comes from MLflow.
        started: when it began, in seconds since the epoch; None if unknown.
    """

    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    series: Mapping[str, Sequence[Sample]] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    started: float | None = None


def overlapping(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """The runs that trained at the same time as another of ``runs`` on the same host, as with joblib's launcher.

    Their throughput is that of a shared machine.
    """
    found: dict[int, FinishedRun] = {}
    last: dict[str, tuple[float, FinishedRun]] = {}  # by host: the latest end so far, and that run
    for run in sorted((run for run in runs if run.started is not None), key=lambda run: run.started or 0.0):
        began, host = run.started or 0.0, run.tags.get("host", "")
        end = began + run.metrics.get("time/total_seconds", 0.0)
        before_end, before = last.get(host, (began, run))
        if began < before_end:
            found |= {id(before): before, id(run): run}
        if end >= before_end:
            last[host] = end, run
    return list(found.values())


def results_by_group(runs: Sequence[FinishedRun]) -> dict[str, list[RunResult]]:
    """The results of the finished runs by group, without runs that cannot measure speedup.

    Left out are oversubscribed runs, and runs that ran at the same time as another run.
    """
    shared = {id(run) for run in overlapping(runs)}
    counted = [
        run
        for run in runs
        if run.tags.get("oversubscribed") != "true" and id(run) not in shared and "test/accuracy" in run.metrics
    ]
    names = grouped([OVERRIDE_START.split(printable(run.tags.get("overrides", ""))) for run in counted])
    groups: dict[str, list[RunResult]] = {name: [] for name in names}
    for run, name in zip(counted, names, strict=True):
        try:
            result = RunResult.of(run.metrics, run.series, load_watch.disturbances(run.metrics))
            Breakdown.of(result.devices, [result.times], result.steps)  # raises for invalid times
            groups[name].append(result)
        except (KeyError, ValueError, OverflowError, ZeroDivisionError) as error:
            overrides = printable(run.tags.get("overrides", ""))
            why = f"{error.args[0]} is missing" if isinstance(error, KeyError) else printable(error)
            raise StorageError(
                f"the metrics of the run with {overrides or 'no overrides'} are invalid: {why}. Leave it out"
            ) from error
    return groups


def is_simulated(runs: Sequence[FinishedRun]) -> bool:
    """Whether devices were ranks on one CPU: CPU ranks that shared a host."""
    return any(
        run.tags.get("accelerator") == "cpu" and run.tags.get("devices", "") != run.tags.get("hosts", "1")
        for run in runs
    )


def machines(runs: Sequence[FinishedRun]) -> list[str]:
    """One line for each machine of the runs."""
    lines = [machine.in_one_line(run.tags) for run in runs]
    return list(dict.fromkeys(filter(None, lines)))


def finished_runs(sweep: str, uri: str | None) -> list[FinishedRun]:
    """The finished runs of a sweep: from its folder unless ``uri`` is given, else from MLflow.

    Raises:
        ConfigError: there is no such sweep.
    """
    folder = find_runs(sweep, SWEEP_RUN_FILE)
    if uri is None and folder.is_dir():
        sweeps = sorted({path.parent for path in folder.rglob(SWEEP_RUN_FILE)})
        if len(sweeps) > 1:  # the runs of several sweeps would count as repeats
            raise ConfigError(f"{folder}: there are {len(sweeps)} sweeps in this folder. Name one, as {sweeps[-1]}")
        found = sorted(folder.rglob(RUN_FILE), key=lambda path: (len(path.parent.name), path.parent.name))
        if found:
            runs = [folder_run(path.parent) for path in found]
            return [run for run in runs if run and "time/total_seconds" in run.metrics]
    return stored_children(MLflowTracker(uri=uri or from_environment("uri")), str(folder))


def folder_run(run_dir: Path) -> FinishedRun | None:
    """A run from its folder; None for a folder that holds no run."""
    if not (run_dir / RUN_FILE).exists():
        return None
    check_folder(run_dir)
    entries = journal.read(run_dir)
    series = {
        name: [(entry.step, entry.time, entry.metrics[name]) for entry in entries if name in entry.metrics]
        for name in SERIES
    }
    run = RunInfo.load(run_dir)
    return FinishedRun(run.tags, journal.last_values(run_dir), series, stored_params(run.params), run.started)


def stored_children(tracker: MLflowTracker, sweep: str) -> list[FinishedRun]:
    """The finished runs of a sweep, from MLflow.

    Raises:
        ConfigError: there is no such sweep in the store.
        TrackingError: the store cannot be read.
    """
    problem = f"tracking.uri={masked_text(tracker.address())}: {sweep} cannot be read there"
    with store_errors(problem, "Start that server, or set another address"):
        return _children(tracker.client(), tracker, sweep)


def _children(client: "MlflowClient", tracker: MLflowTracker, sweep: str) -> list[FinishedRun]:
    from mlflow.exceptions import MlflowException

    parent = run_id(Path(sweep)) or sweep
    try:
        experiment = client.get_run(parent).info.experiment_id
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # the latter: no id at all
            raise
        raise ConfigError(
            f"{sweep}: there is no such run in {tracker.address()}. Name a parent run's id or a folder under "
            f"outputs/multirun, and set tracking.uri=<address> for another store"
        ) from error
    children: Sequence[Run] = client.search_runs(
        [experiment],
        f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'FINISHED'",
        max_results=1000,
        order_by=["attributes.start_time ASC"],
    )
    return [_stored_run(client, run) for run in children]


def _stored_run(client: "MlflowClient", run: "Run") -> FinishedRun:
    began = run.info.start_time
    series = {
        name: sorted(
            (point.step, (point.timestamp - began) / 1000, point.value)
            for point in client.get_metric_history(run.info.run_id, name)
        )
        for name in SERIES
    }
    return FinishedRun(run.data.tags, run.data.metrics, series, stored_params(run.data.params), began / 1000)
