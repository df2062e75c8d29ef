"""One run in MLflow: its parameters, metrics, tags and files."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from cifar_exp.errors import TrackingError
from cifar_exp.records.journal import RUN_ID_FILE, Entry
from cifar_exp.records.run_folder import Outcome, RunInfo, Status
from cifar_exp.system.printable import printable
from cifar_exp.system.redaction import masked, masked_text
from cifar_exp.tracking.dead_runs import close_dead_runs
from cifar_exp.tracking.mlflow_store import FINAL_ERRORS, PARENT_TAG, MLflowStore


class MLflowRun:
    """One MLflow run. All calls are idempotent."""

    def __init__(self, store: MLflowStore, run: RunInfo) -> None:
        self._store, self._run = store, run
        self.run_id: str | None = None

    def open(self) -> None:
        """Import mlflow (seconds), create the store if needed, start the run, log its params.

        Runs that dead processes of this host left open are closed.
        """
        self._client = self._store.client()
        from mlflow.entities import Param

        self._run = self._store.own_run(self._client, self._run)
        parent = self._store.open_parent(self._client, self._run.sweep_dir) if self._run.sweep_dir else None
        tags = {PARENT_TAG: parent} if parent else {}
        self.run_id = self._store.open_run(self._client, self._run, tags)
        stored = self._client.get_run(self.run_id)
        self._began, self._place = stored.info.start_time, str(stored.info.artifact_uri)
        # A resumed run has its params already, and MLflow allows no change.
        new = {name: value for name, value in masked(self._run.params).items() if name not in stored.data.params}
        params = [Param(name, printable(value)) for name, value in new.items()]
        for start in range(0, len(params), 100):  # MLflow's limit a batch
            self._client.log_batch(self.run_id, params=params[start : start + 100])
        close_dead_runs(self._client, self._store.experiment_id(self._client))

    def write(self, entries: Sequence[Entry]) -> None:
        """Log all metrics of ``entries``, a thousand a call (MLflow's limit).

        A repeated point is stored once: MLflow's stores drop equal points (name, step, time, value), and the time is
        computed from the run's start and the journal alone.
        """
        from mlflow.entities import Metric

        assert self.run_id
        metrics = [
            Metric(_allowed(name), value, self._timestamp(entry), entry.step)
            for entry in entries
            for name, value in entry.metrics.items()
        ]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + 1000])

    def missing(self, entries: Sequence[Entry]) -> list[Entry]:
        """The part of ``entries`` that the store lacks."""
        assert self.run_id
        names = {name for entry in entries for name in entry.metrics}
        there = {name: self._points(name) for name in names}
        rest = (replace(entry, metrics=self._without(entry, there)) for entry in entries)
        return [entry for entry in rest if entry.metrics]

    def _points(self, name: str) -> set[tuple[int, int]]:
        """Step and time in milliseconds of a metric's points in the store."""
        assert self.run_id
        history = self._client.get_metric_history(self.run_id, _allowed(name))
        return {(point.step, point.timestamp) for point in history}

    def _without(self, entry: Entry, there: Mapping[str, set[tuple[int, int]]]) -> dict[str, float]:
        point = (entry.step, self._timestamp(entry))
        return {name: value for name, value in entry.metrics.items() if point not in there[name]}

    def _timestamp(self, entry: Entry) -> int:
        """Milliseconds since the epoch."""
        return int(self._began + round(entry.time * 1000))

    def artifacts(self) -> list[Path]:
        """The existing files of the run's folder that are stored with the run. No link is followed."""
        paths = [self._run.run_dir / name for name in self._run.artifacts]
        return [path for path in paths if path.is_file() and not path.is_symlink()]

    def close(self, status: Status) -> None:
        """Store the artifacts and close the run with its status."""
        assert self.run_id
        outcome = Outcome.of(self._run.run_dir)
        try:
            self._check_place()
            for path in self.artifacts():
                self._client.log_artifact(self.run_id, str(path))
        finally:
            self._client.set_terminated(self.run_id, status, round(outcome.ended * 1000) if outcome else None)

    def _check_place(self) -> None:
        """Check where the store keeps the run's files: the store may be anybody's.

        Raises:
            TrackingError: the place is no folder of the run, or the default store names another machine.
        """
        place = urlsplit(self._place)
        is_remote = self._store.uri is None and place.scheme not in ("", "file", "mlflow-artifacts")
        if is_remote or not place.path.endswith(f"/{self.run_id}/artifacts"):
            raise TrackingError(
                f"tracking.uri={masked_text(self._store.address())}: it keeps the files of run {self.run_id} at "
                f"{printable(masked_text(self._place))}, which is not the run's own folder. Nothing was written there. "
                f"Set tracking.experiment=<a new name>, and remove {self._run.run_dir / RUN_ID_FILE}"
            )

    def is_final(self, error: Exception) -> bool:
        return isinstance(error, TrackingError) or any(text in str(error) for text in FINAL_ERRORS)


def point_count(entries: Sequence[Entry]) -> int:
    """Number of metric values in the entries."""
    return sum(len(entry.metrics) for entry in entries)


def _allowed(name: str) -> str:
    """A metric's name with characters that MLflow refuses replaced by underscores."""
    return re.sub(r"[^\w\-. :/]", "_", name)
