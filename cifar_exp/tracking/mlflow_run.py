"""One run in MLflow: its parameters, metrics, tags and files."""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cifar_exp.errors import TrackingError
from cifar_exp.records.journal import RUN_ID_FILE, Entry
from cifar_exp.records.run_folder import Outcome, RunInfo, Status
from cifar_exp.system.printable import printable
from cifar_exp.system.redaction import masked, masked_text
from cifar_exp.tracking.dead_runs import close_dead_runs
from cifar_exp.tracking.mlflow_items import METRICS, PARAMS_OR_TAGS, MetricNames, log_each, with_allowed_names
from cifar_exp.tracking.mlflow_store import ADOPTED_TAG, PARENT_TAG, MLflowStore
from cifar_exp.tracking.store_problems import advice, is_permanent, optional_modules, shortened_error

NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT)


class MLflowRun:
    """One MLflow run. All calls are idempotent. The journal's entries are passed in order, from the first on."""

    def __init__(self, store: MLflowStore, run: RunInfo, restores: bool = True) -> None:
        """``restores``: whether the run is restored if it was deleted in MLflow."""
        self._store, self._run, self._restores = store, run, restores
        self.run_id: str | None = None
        self._names = MetricNames()
        self._earlier: dict[str, set[tuple[int, int]]] = {}  # points that earlier sessions sent, see `write`
        self._refused: set[str] = set()  # names of params and metrics whose refusal was reported

    def open(self) -> None:
        """Import mlflow (seconds), create the store if needed, start the run, log its params.

        Runs that dead processes of this host left open are closed.
        """
        self._client = self._store.client()
        from mlflow.entities import Param

        self._run = self._store.own_run(self._client, self._run)
        sweep = self._run.sweep_dir
        parent = self._store.open_parent(self._client, sweep, self._restores) if sweep else None
        tags = {PARENT_TAG: parent} if parent else {}
        self.run_id = self._store.open_run(self._client, self._run, tags, self._restores)
        stored = self._client.get_run(self.run_id)
        is_older = ADOPTED_TAG in stored.data.tags  # the run began before this package continued it
        self._has_foreign_points = is_older
        self._began = round(self._run.started * 1000) if is_older else stored.info.start_time
        self._place = str(stored.info.artifact_uri)
        # A resumed run has its params already, and MLflow allows no change.
        named = with_allowed_names(masked(self._run.params))
        params = [Param(name, value) for name, value in named.items() if name not in stored.data.params]
        self._log(params, PARAMS_OR_TAGS, "params")
        close_dead_runs(self._client, self._store.id_of_experiment(self._client))

    def write(self, entries: Sequence[Entry]) -> None:
        """Log all metrics of ``entries``, a thousand a call (MLflow's limit).

        A repeated point is stored once: MLflow's stores drop equal points (name, step, time, value), and the time is
        computed only from the run's start and the journal. A resumed run leaves out steps that the store already has.
        If the folder was restored from a backup, these steps are trained again, at another time.
        """
        from mlflow.entities import Metric

        self._choose_names(entries)
        if len(self._run.sessions) > 1:
            for name in _names_of(entries) - self._earlier.keys():
                self._earlier[name] = self._points(name)
            entries = [self._without(entry, self._earlier) for entry in entries]
        metrics = [
            Metric(self._names[name], value, self._timestamp(entry), entry.step)
            for entry in entries
            for name, value in entry.metrics.items()
        ]
        self._log(metrics, METRICS, "metrics")

    def _choose_names(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._names.add(entry.metrics)

    def _log(self, items: Sequence[Any], limit: int, kind: str) -> None:
        client: Any = self._client
        log = partial(client.log_batch, self.run_id)
        log_each(items, limit, lambda some: log(**{kind: some}), self._refused)

    def missing(self, entries: Sequence[Entry]) -> list[Entry]:
        """The part of ``entries`` that the store lacks."""
        self._choose_names(entries)
        there = {name: self._points(name) for name in _names_of(entries)}
        rest = (self._without(entry, there) for entry in entries)
        return [entry for entry in rest if entry.metrics]

    def _points(self, name: str) -> set[tuple[int, int]]:
        """The points of a metric in the store, in the form of :meth:`_point`."""
        assert self.run_id
        history = self._client.get_metric_history(self.run_id, self._names[name])
        return {self._point(point.step, point.timestamp) for point in history}

    def _point(self, step: int, timestamp: int) -> tuple[int, int]:
        """What identifies a point of a metric: the step, as in the journal.

        A run that another program began may have that program's points at the same steps. There the time counts, too.
        """
        return (step, timestamp if self._has_foreign_points else 0)

    def _without(self, entry: Entry, there: Mapping[str, set[tuple[int, int]]]) -> Entry:
        point = self._point(entry.step, self._timestamp(entry))
        rest = {name: value for name, value in entry.metrics.items() if point not in there[name]}
        return replace(entry, metrics=rest)

    def _timestamp(self, entry: Entry) -> int:
        """Milliseconds since the epoch."""
        return int(self._began + round(entry.time * 1000))

    def artifacts(self) -> list[Path]:
        """The existing files of the run's folder that are stored with the run. Links are not followed."""
        paths = [self._run.run_dir / name for name in self._run.artifacts]
        return [path for path in paths if path.is_file() and not path.is_symlink()]

    def close(self, status: Status) -> None:
        """Store the artifacts and close the run with its status."""
        assert self.run_id
        outcome = Outcome.of(self._run.run_dir)
        try:
            self.store_files()
        finally:
            self._client.set_terminated(self.run_id, status, round(outcome.ended * 1000) if outcome else None)

    def _check_place(self) -> None:
        """Check where the store keeps the run's files: the store may be another user's.

        Raises:
            TrackingError: the place is not a folder of the run, or the default store names another machine.
        """
        place = urlsplit(self._place)
        is_remote = self._store.uri is None and place.scheme not in ("", "file", "mlflow-artifacts")
        if is_remote or not place.path.endswith(f"/{self.run_id}/artifacts"):
            raise TrackingError(
                f"tracking.uri={masked_text(self._store.address())}: it keeps the files of run {self.run_id} at "
                f"{printable(masked_text(self._place))}, which is not the run's own folder. Nothing was written there. "
                f"Set tracking.experiment=<a new name>, and remove {self._run.run_dir / RUN_ID_FILE}"
            )

    def store_files(self) -> None:
        """Store the files. If one cannot be stored, the others still are.

        Raises:
            TrackingError: the store's place is not writable, or a file is too large for the server.
        """
        self._check_place()
        problems: list[TrackingError] = []
        for path in self.artifacts():
            try:
                with optional_modules(self._place):
                    self._client.log_artifact(self.run_id, str(path))
            except Exception as error:
                if problem := self._file_problem(path, error):
                    problems.append(problem)
                else:
                    raise
        if problems:
            raise problems[0]

    def _file_problem(self, path: Path, error: Exception) -> TrackingError | None:
        """What is wrong with a file or the place for it; None for the store's other errors."""
        problem = f"{path.name} cannot be stored at {printable(masked_text(self._place))}: {shortened_error(error)}"
        if isinstance(error, TrackingError):
            return error
        if isinstance(error, OSError) and error.errno in NO_PERMISSION:
            return TrackingError(
                f"{problem}. Let this user write there. If the place is a server's own, start that server with "
                f"--artifacts-destination and set tracking.experiment=<a new name>"
            )
        if "413" in str(error) and is_permanent(error):
            return TrackingError(f"{problem}. {advice(error)}")
        return None

    def is_final(self, error: Exception) -> bool:
        return is_permanent(error)


def _names_of(entries: Sequence[Entry]) -> set[str]:
    return {name for entry in entries for name in entry.metrics}


def point_count(entries: Sequence[Entry]) -> int:
    """Number of metric values in the entries."""
    return sum(len(entry.metrics) for entry in entries)
