"""Trackers: what takes the record of runs. MLflow is reached from the parent process alone, never from a rank."""

import logging
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cifar_exp import owner
from cifar_exp.errors import CifarExpError, ConfigError, TrackingError
from cifar_exp.journal import RUN_ID_FILE, Entry, read, run_id
from cifar_exp.privacy import masked, masked_text
from cifar_exp.process import uv_prefix
from cifar_exp.record import (
    OUTPUTS,
    SWEEP_RUN_FILE,
    Outcome,
    RunInfo,
    Status,
    claim,
    make_private,
    settle,
    sync_command,
)
from cifar_exp.recording import BATCH, Sink, shortened
from cifar_exp.stale import close_dead_runs, is_dead, owner_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient

MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it holds the address as it is
    # Whoever calls tries again. MLflow itself would make a run twice where only the answer to the first try was lost.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds without a byte
}
SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
LOCK_TIMEOUT = 60.0  # seconds: eight starts at once wait for the first one, which makes the store
KEY_TAG = "run_key"
PARENT_TAG = "mlflow.parentRunId"
# What stores say where trying again is of no use.
FINAL = (
    "file is not a database",
    "database disk image is malformed",
    "out-of-date database schema",
    "Can't locate revision",
    "error code 401",
    "error code 403",
)


class Tracker(Protocol):
    """What `_target_` of ``conf/tracking`` is: opens a sink for a run."""

    def sink(self, run: RunInfo) -> Sink | None:
        """What takes the journal of ``run``, or of the parent run of a sweep."""
        ...

    def hint(self) -> str:
        """What to type to look at the runs."""
        ...

    def store(self) -> str:
        """Where it keeps them, without passwords."""
        ...

    def deliver(self, run_dir: Path) -> str:
        """Bring one run that has ended up to date; what was delivered, in a line."""
        ...


@dataclass(frozen=True)
class NoTracker:
    """The journal is all there is. A preset may name an experiment all the same."""

    experiment: str | None = None

    def sink(self, run: RunInfo) -> None:  # noqa: ARG002
        return None

    def hint(self) -> str:
        return ""

    def store(self) -> str:
        return ""

    def deliver(self, run_dir: Path) -> str:
        return f"{run_dir}: nothing to deliver"


@dataclass(frozen=True)
class MLflowTracker:
    """MLflow, by default an SQLite store and artifacts under ``outputs/``.

    Attributes:
        uri: MLflow's tracking address; None is the store under ``outputs/``.
        experiment: the experiment that runs belong to, made where it is missing.
    """

    uri: str | None = None
    experiment: str = "cifar-exp"

    def __post_init__(self) -> None:
        scheme = (self.uri or "sqlite:").partition(":")[0].partition("+")[0]
        if scheme not in SCHEMES:
            raise ConfigError(
                f"tracking.uri={self.uri}: it must begin with one of {', '.join(SCHEMES)}. Type "
                f"tracking.uri=sqlite:///runs.db or tracking.uri=http://localhost:5000, or leave it out"
            )

    def sink(self, run: RunInfo) -> "MLflowRun":
        return MLflowRun(self, run)

    def address(self) -> str:
        """The tracking address in full."""
        return self.uri or f"sqlite:///{OUTPUTS.resolve() / 'mlflow.db'}"

    def store(self) -> str:
        return f"{masked_text(self.uri or str(OUTPUTS / 'mlflow.db'))}, experiment {self.experiment}"

    def hint(self) -> str:
        address = masked_text(self.address())
        if address.startswith("http"):
            return f"open {address} in a browser"
        return f"{uv_prefix()}mlflow ui --backend-store-uri {shlex.quote(address)}"

    def client(self) -> "MlflowClient":
        """A client of the store, which is made first where it is missing.

        A fresh SQLite store is set up under a lock: several processes that do it at once fail.

        Raises:
            TrackingError: where the experiment was deleted.
            Exception: whatever MLflow raises where the store cannot be had.
        """
        for name, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # they tell at length what they raise as well
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if self.uri is None:
            OUTPUTS.mkdir(exist_ok=True)
            make_private(OUTPUTS)
        database = self.address().partition("sqlite:///")[2]
        # A server is its own guard, and one that does not answer must not hold up other runs.
        with owner.held(Path(f"{database}.lock"), LOCK_TIMEOUT) if database else nullcontext():
            # An address that says more than a file's name, or is in memory, is left to MLflow.
            if database and not {"?", ":"} & {*database} and not Path(database).exists():
                _make_store(Path(database))
            client = MlflowClient(self.address())
            experiment = client.get_experiment_by_name(self.experiment)
            if experiment is None:
                # Left to itself, MLflow puts the artifacts of an SQLite store into the current folder.
                location = (OUTPUTS / "artifacts" / self.experiment).resolve().as_uri() if database else None
                client.create_experiment(self.experiment, artifact_location=location)
            elif experiment.lifecycle_stage == "deleted":
                raise TrackingError(
                    f"tracking.experiment={self.experiment}: it was deleted. Restore it in MLflow, or type another name"
                )
        return client

    def deliver(self, run_dir: Path) -> str:
        """Bring one run up to date in the store; what was delivered, in a line.

        Raises:
            ConfigError: where the run is still being trained.
            TrackingError: where the store cannot be reached.
        """
        with claim(run_dir):
            run, outcome = RunInfo.load(run_dir), Outcome.of(run_dir)
            status = outcome.status if outcome else "KILLED"
            entries = read(run_dir)
            sink = self.sink(run)
            address = masked_text(self.address())
            try:
                sink.open()
                missing = sink.missing(entries)
                for start in range(0, len(missing), BATCH):
                    sink.write(missing[start : start + BATCH])
                sink.close(status)
            except CifarExpError:
                raise
            except Exception as error:  # MLflow raises whatever its store does
                raise TrackingError(
                    f"tracking.uri={address}: {run_dir} could not be delivered: {shortened(error)}. Nothing is lost: "
                    f"type {sync_command(run_dir)} once the store can be reached; an address with a "
                    f"password is not kept, so type tracking.uri=<address> after it"
                ) from error
            owed = settle(run_dir, self.store())
        return (
            f"{run_dir}: {_points(missing)} of {_points(entries)} points were missing and are there now, "
            f"{len(sink.artifacts())} files, {status}: run {sink.run_id} in {address}"
            + (f"; it was to be in {owed}, too, which has not got all of it" if owed else "")
        )

    def experiment_id(self, client: "MlflowClient") -> str:
        """MLflow's id of the experiment, which :meth:`client` has made."""
        experiment = client.get_experiment_by_name(self.experiment)
        assert experiment is not None
        return str(experiment.experiment_id)

    def open_run(self, client: "MlflowClient", run: RunInfo, tags: Mapping[str, str]) -> str:
        """Start a run in the experiment, or go on with the one that an earlier call has started; its id."""
        from mlflow.entities import RunTag

        tags = {**run.tags, **tags, **owner_tags(run.run_dir)}
        identity = self.find_run(client, run)
        if identity is None:
            identity = self._create_run(client, run, tags)
        else:
            # First the tags: whatever is running tells whose it is.
            client.log_batch(identity, tags=[RunTag(name, value) for name, value in tags.items()])
            client.update_run(identity, status="RUNNING")
        return identity

    def open_parent(self, client: "MlflowClient", folder: Path) -> str | None:
        """The parent run of the sweep in ``folder``, started by whichever of its jobs is the first to come here."""
        if not (folder / SWEEP_RUN_FILE).exists():
            return None
        with owner.held(folder / ".mlflow.lock", LOCK_TIMEOUT):
            run = RunInfo.load(folder)
            identity = self.find_run(client, run)
            goes_on = Outcome.of(folder) is None  # it may have been closed when an earlier session had died
            if identity is None or (goes_on and is_dead(client.get_run(identity).data.tags)):
                return self.open_run(client, run, {})
            return identity

    def find_run(self, client: "MlflowClient", run: RunInfo) -> str | None:
        """The id of the run in this store, by what its folder says or by its key; None where it has none."""
        from mlflow.exceptions import MlflowException

        if identity := run_id(run.run_dir):
            try:
                return str(client.get_run(identity).info.run_id)
            except MlflowException as error:
                # Another store gets a run of its own, with everything.
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        if not run.key:
            return None
        found = client.search_runs([self.experiment_id(client)], f"tags.{KEY_TAG} = '{run.key}'", max_results=1)
        if not found:
            return None
        return self._note(run, found[0].info.run_id)

    def _create_run(self, client: "MlflowClient", run: RunInfo, tags: Mapping[str, str]) -> str:
        created = client.create_run(
            self.experiment_id(client),
            start_time=round(run.started * 1000),
            tags={**tags, KEY_TAG: run.key} if run.key else dict(tags),
            run_name=run.name,
        )
        return self._note(run, created.info.run_id)

    def _note(self, run: RunInfo, identity: str) -> str:
        path = run.run_dir / RUN_ID_FILE
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(f"{identity}\n")
        temporary.replace(path)
        return identity


def _make_store(path: Path) -> None:
    """Make an SQLite store whole or not at all: MLflow takes seconds for it, and cannot go on with a half-made one."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)  # of a process that was killed
    make: Any = SqlAlchemyStore
    make(f"sqlite:///{unfinished}", OUTPUTS.resolve().as_uri()).engine.dispose()
    unfinished.replace(path)


class MLflowRun:
    """One run in MLflow: opened, fed and closed by the parent. Whatever is passed again changes nothing."""

    def __init__(self, tracker: MLflowTracker, run: RunInfo) -> None:
        self._tracker, self._run = tracker, run
        self.run_id: str | None = None

    def open(self) -> None:
        """Import mlflow (seconds), make the store where needed, start the run, log its params.

        Runs that a dead process of this host has left open are closed.
        """
        self._client = self._tracker.client()
        from mlflow.entities import Param

        parent = self._tracker.open_parent(self._client, self._run.sweep_dir) if self._run.sweep_dir else None
        tags = {PARENT_TAG: parent} if parent else {}
        self.run_id = self._tracker.open_run(self._client, self._run, tags)
        stored = self._client.get_run(self.run_id)
        self._began = stored.info.start_time
        # Of a run that goes on: MLflow lets no param be changed.
        new = {name: value for name, value in masked(self._run.params).items() if name not in stored.data.params}
        params = [Param(name, str(value)) for name, value in new.items()]
        for start in range(0, len(params), 100):  # MLflow's limit a batch
            self._client.log_batch(self.run_id, params=params[start : start + 100])
        close_dead_runs(self._client, self._tracker.experiment_id(self._client))

    def write(self, entries: Sequence[Entry]) -> None:
        """Log all metrics of ``entries``, a thousand a call (MLflow's limit).

        What is passed again is kept once: MLflow's stores know equal points (name, step, time, value), and the time is
        made of the run's start and the journal alone.
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
        """What of ``entries`` the store does not hold."""
        assert self.run_id
        names = {name for entry in entries for name in entry.metrics}
        there = {name: self._points(name) for name in names}
        rest = (replace(entry, metrics=self._without(entry, there)) for entry in entries)
        return [entry for entry in rest if entry.metrics]

    def _points(self, name: str) -> set[tuple[int, int]]:
        """Step and time in milliseconds of what the store holds of a metric."""
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
        """The files of the run's folder that are kept with it, as far as they exist."""
        paths = [self._run.run_dir / name for name in self._run.artifacts]
        return [path for path in paths if path.exists()]

    def close(self, status: Status) -> None:
        """Keep the artifacts and close the run with its true status."""
        assert self.run_id
        outcome = Outcome.of(self._run.run_dir)
        try:
            for path in self.artifacts():
                self._client.log_artifact(self.run_id, str(path))
        finally:
            self._client.set_terminated(self.run_id, status, round(outcome.ended * 1000) if outcome else None)

    def is_final(self, error: Exception) -> bool:
        return isinstance(error, TrackingError) or any(text in str(error) for text in FINAL)


def _points(entries: Sequence[Entry]) -> int:
    return sum(len(entry.metrics) for entry in entries)


def _allowed(name: str) -> str:
    """A metric's name without what MLflow refuses in one."""
    return re.sub(r"[^\w\-. :/]", "_", name)
