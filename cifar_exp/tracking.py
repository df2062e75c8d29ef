"""In the parent process: follows the journal and feeds trackers in batches, away from the training.

The journal on disk is the truth; a tracker that cannot be reached costs the training nothing.
"""

import json
import logging
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from filelock import FileLock

from cifar_exp.errors import ConfigError, StorageError, TrackingError
from cifar_exp.journal import FILE_NAME, Entry, JournalFollower, JournalWriter, read

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]
OUTPUTS = Path("outputs")
MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    # A dead server would hold the end of a run for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # seconds
}
NOT_IN_NAMES = r"[^\w\-. :/]"  # what MLflow refuses in the name of a metric
SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
RUN_FILE = "run.json"
RUN_ID_FILE = "mlflow_run_id"


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told of a run when it opens.

    Attributes:
        name: shown in lists of runs.
        run_dir: the run's folder; what ``artifacts`` name lies in it.
        params: the resolved configuration, flattened.
        tags: device count, accelerator, sweep.
        artifacts: files of the run's folder to keep with the run at its end, where they exist.
    """

    name: str
    run_dir: Path
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    artifacts: Sequence[str] = ()

    def save(self, config_hash: str) -> None:
        """Leave name, tags and params in the run's folder, where reports and later tools find them."""
        params = without_password(self.params)
        content = {"name": self.name, "config_hash": config_hash, "tags": dict(self.tags), "params": params}
        temporary = self.run_dir / f"{RUN_FILE}.tmp"
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.run_dir / RUN_FILE)


class Sink(Protocol):
    """Something that takes a run's journal while it grows. All calls come from one thread."""

    def open(self) -> None: ...

    def write(self, entries: Sequence[Entry]) -> None: ...

    def close(self, status: Status) -> None: ...


class Tracker(Protocol):
    """What `_target_` of ``conf/tracking`` is: opens a sink for a run."""

    def sink(self, run: RunInfo) -> Sink | None: ...

    def open_sweep(self, sweep_dir: Path, tags: Mapping[str, str]) -> "SweepRun | None":
        """Start the parent run of a sweep."""
        ...

    def hint(self) -> str:
        """What to type to look at the runs."""
        ...


class SweepRun(Protocol):
    """The parent run of a sweep."""

    def log(
        self, metrics: Sequence[tuple[str, float, int]], artifacts: Sequence[Path], tags: Mapping[str, str]
    ) -> None:
        """Metrics as (name, value, step), files, and tags."""
        ...

    def close(self, status: Status) -> None: ...


@dataclass(frozen=True)
class NoTracker:
    """The journal is all there is. A preset may name an experiment all the same."""

    experiment: str | None = None

    def sink(self, run: RunInfo) -> None:  # noqa: ARG002
        return None

    def open_sweep(self, sweep_dir: Path, tags: Mapping[str, str]) -> None:  # noqa: ARG002
        return None

    def hint(self) -> str:
        return ""


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

    def open_sweep(self, sweep_dir: Path, tags: Mapping[str, str]) -> "MLflowSweep":
        client = self.client()
        identity = self.create_run(client, f"sweep {sweep_dir.name}", tags, sweep_dir)
        return MLflowSweep(client, identity)

    def address(self) -> str:
        """The tracking address in full."""
        return self.uri or f"sqlite:///{OUTPUTS.resolve() / 'mlflow.db'}"

    def hint(self) -> str:
        address = without_password(self.address())
        if address.startswith("http"):
            return f"open {address} in a browser"
        return f"{uv_prefix()}mlflow ui --backend-store-uri {shlex.quote(address)}"

    def client(self) -> "MlflowClient":
        """A client of the store, which is made first where it is missing.

        A fresh SQLite store is set up under a lock: several processes that do it at once fail.
        """
        for name, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # they tell at length how they make a store
            logging.getLogger(name).setLevel(logging.WARNING)
        if self.uri is None:
            OUTPUTS.mkdir(exist_ok=True)
        database = self.address().partition("sqlite:///")[2]
        # A server is its own guard, and one that does not answer must not hold up other runs.
        with FileLock(f"{database}.lock") if database else nullcontext():
            client = MlflowClient(self.address())  # makes a missing SQLite store
            if client.get_experiment_by_name(self.experiment) is None:
                # Left to itself, MLflow puts the artifacts of an SQLite store into the current folder.
                location = (OUTPUTS / "artifacts" / self.experiment).resolve().as_uri() if database else None
                client.create_experiment(self.experiment, artifact_location=location)
        return client

    def create_run(self, client: "MlflowClient", name: str, tags: Mapping[str, str], folder: Path) -> str:
        """Start the run of ``folder`` in the experiment, or go on with the one that it has; the run's id."""
        from mlflow.exceptions import MlflowException

        if identity := run_id(folder):
            try:
                client.update_run(identity, status="RUNNING")
                return identity
            except MlflowException as error:
                # Another store gets a run of its own, with everything.
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        experiment = client.get_experiment_by_name(self.experiment)
        assert experiment is not None
        identity = str(client.create_run(experiment.experiment_id, tags=dict(tags), run_name=name).info.run_id)
        (folder / RUN_ID_FILE).write_text(identity + "\n")
        return identity


class MLflowRun:
    """One run in MLflow, opened, fed and closed by the parent."""

    def __init__(self, tracker: MLflowTracker, run: RunInfo) -> None:
        self._tracker, self._run = tracker, run
        self.run_id: str | None = None

    def open(self) -> None:
        """Import mlflow (seconds), make the store where needed, start the run, log its params."""
        self._client = self._tracker.client()
        from mlflow.entities import Param

        self.run_id = self._tracker.create_run(self._client, self._run.name, self._run.tags, self._run.run_dir)
        there = self._client.get_run(self.run_id).data.params  # of a run that goes on: MLflow lets none be changed
        new = {name: value for name, value in self._run.params.items() if name not in there}
        params = [Param(name, str(without_password(value))) for name, value in new.items()]
        for start in range(0, len(params), 100):  # MLflow's limit a batch
            self._client.log_batch(self.run_id, params=params[start : start + 100])

    def write(self, entries: Sequence[Entry]) -> None:
        """Log all metrics of ``entries``, a thousand a call (MLflow's limit).

        A run that goes on passes its whole journal again: the store keeps equal points (name, step, time, value) once.
        """
        from mlflow.entities import Metric

        assert self.run_id
        began = self._client.get_run(self.run_id).info.start_time
        metrics = [
            Metric(name, value, began + round(entry.time * 1000), entry.step)
            for entry in entries
            for name, value in entry.metrics.items()
        ]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + 1000])

    def close(self, status: Status) -> None:
        """Keep the artifacts and close the run with its true status."""
        assert self.run_id
        try:
            for name in self._run.artifacts:
                if (self._run.run_dir / name).exists():
                    self._client.log_artifact(self.run_id, str(self._run.run_dir / name))
        finally:
            self._client.set_terminated(self.run_id, status)


@dataclass(frozen=True)
class MLflowSweep:
    """The parent run of a sweep in MLflow; its children carry MLflow's parent tag."""

    client: "MlflowClient"
    run_id: str

    def log(
        self, metrics: Sequence[tuple[str, float, int]], artifacts: Sequence[Path], tags: Mapping[str, str]
    ) -> None:
        from mlflow.entities import Metric, RunTag

        for path in artifacts:
            self.client.log_artifact(self.run_id, str(path))
        now = round(time.time() * 1000)
        self.client.log_batch(
            self.run_id,
            metrics=[Metric(re.sub(NOT_IN_NAMES, "_", name), value, now, step) for name, value, step in metrics],
            tags=[RunTag(name, value) for name, value in tags.items()],
        )

    def close(self, status: Status) -> None:
        self.client.set_terminated(self.run_id, status)


def uv_prefix() -> str:
    """What to type before a command of the environment: uv sets this variable for what it runs."""
    return "uv run " if "UV" in os.environ else ""


def run_id(folder: Path) -> str | None:
    """The id of the run or sweep in ``folder``; None where it was not tracked."""
    path = folder / RUN_ID_FILE
    return path.read_text().strip() if path.exists() else None


def without_password(value: Any) -> Any:
    """Addresses without the user's name and password, in a text or however deep in a mapping; all else as it is."""
    if isinstance(value, Mapping):
        return {name: without_password(item) for name, item in value.items()}
    return re.sub(r"://[^/\s]*@", "://", value) if isinstance(value, str) else value


def shortened(error: Exception) -> str:
    """What an error says in a line: HTTP libraries tell the whole chain of their calls."""
    text = str(without_password(str(error))).splitlines()[0] if str(error) else ""
    return text if len(text) <= 200 else f"{text[:120]} ... {text[-75:]}"


class Follower(threading.Thread):
    """Passes the journal on to one sink from a thread of its own, until told how the run ended."""

    def __init__(self, run_dir: Path, sink: Sink, interval: float) -> None:
        """``interval``: seconds between two looks at the journal."""
        super().__init__(name=f"follower of {type(sink).__name__}", daemon=True)
        self.error: Exception | None = None
        self.sink = sink
        self._journal, self._interval = JournalFollower(run_dir), interval
        self._status: Status | None = None
        self._wanted = self._passed = 0  # looks asked for and done
        self._changed = threading.Condition()

    def run(self) -> None:
        try:
            self.sink.open()
            while not self._look():
                pass
        except Exception as error:
            self._fail(error)
        try:
            assert self._status
            self.sink.close(self._status)
        except Exception as error:
            self.error = self.error or error

    def flush(self) -> None:
        """Wait until everything that the journal holds now was passed on, or the sink has failed."""
        with self._changed:
            self._wanted += 1
            wanted = self._wanted
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._passed >= wanted or self.error)

    def finish(self, status: Status) -> None:
        """Pass on what is left, close the sink, and wait for both."""
        with self._changed:
            self._status = status
            self._wanted += 1
            self._changed.notify_all()
        self.join()

    def _look(self) -> bool:
        """Wait for the next look, pass on what is new; whether it was the last look."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanted > self._passed, timeout=self._interval)
            wanted, last = self._wanted, self._status is not None
        entries = list(self._journal.new_entries())
        if entries:
            self.sink.write(entries)
        with self._changed:
            self._passed = wanted
            self._changed.notify_all()
        return last

    def _fail(self, error: Exception) -> None:
        told = f"cifar-exp: {type(self.sink).__name__} failed, training goes on: {shortened(error)}"
        print(told, file=sys.stderr, flush=True)
        with self._changed:
            self.error = error
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._status is not None)


@dataclass
class Recording:
    """Follows one run's journal with a display and a tracker, from ``with`` to its end.

    The run is closed as FINISHED, FAILED (an exception) or KILLED (a signal).

    Attributes:
        run_dir: the run's folder.
        started: when the run began, seconds since the epoch.
        tracker: records it; None where nothing does.
        closing: metrics of the parent's own, for the last entry.
    """

    run_dir: Path
    started: float
    tracker: Sink | None
    closing: dict[str, float] = field(default_factory=dict)
    _followers: list[Follower] = field(default_factory=list)

    def __enter__(self) -> "Recording":
        return self

    def start(self, display: Sink) -> None:
        """Follow the journal from now on: show it to a person, and record it."""
        # The page first: it is among the files that the tracker keeps at the end.
        self._followers.append(Follower(self.run_dir, display, interval=0.5))
        self._start_tracker()
        self._followers[0].start()

    def _start_tracker(self) -> None:
        if self.tracker:
            self._followers.append(Follower(self.run_dir, self.tracker, interval=2.0))
            self._followers[-1].start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close everything; a tracker that failed is the run's error where there is no worse one.

        Raises:
            TrackingError: where training went well but the tracker did not get everything.
        """
        if not self._followers:  # the run failed before it could start, which is recorded too
            self._start_tracker()
        status: Status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        try:
            if error is None:
                self._write_last_entry()
        except BaseException:
            status = "FAILED"
            raise
        finally:
            for follower in self._followers:
                follower.finish(status)
        if error is not None:
            return
        for follower in self._followers:
            if follower.error and follower.sink is not self.tracker:
                raise StorageError(
                    f"{self.run_dir}: training finished, but its page or figure could not be written: "
                    f"{shortened(follower.error)}"
                ) from follower.error
            if follower.error:
                raise TrackingError(
                    f"tracking.uri: training finished and nothing is lost, but the tracker failed: "
                    f"{type(follower.error).__name__}: {shortened(follower.error)}. "
                    f"All metrics are in {self.run_dir / FILE_NAME}"
                ) from follower.error

    def _write_last_entry(self) -> None:
        """The ranks have ended: add the total, and what of it none of them could know."""
        ranks_ended = time.time()
        for follower in self._followers:
            follower.flush()
        entries = read(self.run_dir)
        if not entries:
            return
        last = entries[-1]
        now = time.time()
        total, tracking = now - self.started, now - ranks_ended
        split = sum(value for name, value in last.metrics.items() if name.startswith("time_split/"))
        metrics = {
            "time/total_seconds": total,
            "time_split/tracking": tracking,
            "time_split/other": total - tracking - split,
            **self.closing,
        }
        writer = JournalWriter(self.run_dir)
        writer.write(Entry(last.step, last.epoch, total, metrics))
        writer.close()
