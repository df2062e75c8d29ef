"""The MLflow store: its address, its experiment, opening and finding runs."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_exp.errors import CifarExpError, ConfigError, TrackingError
from cifar_exp.records.journal import RUN_ID_FILE, run_id
from cifar_exp.records.run_folder import OUTPUTS, SWEEP_RUN_FILE, Outcome, RunInfo, make_folder
from cifar_exp.records.run_identity import as_another_run
from cifar_exp.system import locks
from cifar_exp.system.atomic_files import atomic_path, write_atomically
from cifar_exp.system.bugs import is_bug
from cifar_exp.system.printable import tell
from cifar_exp.tracking.dead_runs import is_dead, owner_tags
from cifar_exp.tracking.follower import shortened
from cifar_exp.tracking.store_address import (
    artifact_address,
    database_of,
    follow_moved_store,
    is_sqlite,
    make_sqlite_store,
    sqlite_address,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it shows the address with its password
    # Callers retry. MLflow's own retry would create a run twice if only the response was lost.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds without data
}
SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
LOCK_TIMEOUT = 60.0  # seconds; eight simultaneous starts wait for the first one, which creates the store
KEY_TAG = "run_key"
SESSION_TAG = "session"  # the last session that trained the run
PARENT_TAG = "mlflow.parentRunId"
# Parts of error messages after which a retry cannot succeed.
FINAL_ERRORS = (
    "file is not a database",
    "database disk image is malformed",
    "out-of-date database schema",
    "Can't locate revision",
    "error code 401",
    "error code 403",
)


@dataclass(frozen=True)
class MLflowStore:
    """An MLflow store, by default SQLite and artifacts under ``outputs/``.

    Attributes:
        uri: MLflow's tracking address; None is the store under ``outputs/``.
        experiment: the experiment of the runs, created if missing.
    """

    uri: str | None = None
    experiment: str = "cifar-exp"

    def __post_init__(self) -> None:
        scheme = (self.uri or "sqlite:").partition(":")[0].partition("+")[0]
        if scheme not in SCHEMES:
            raise ConfigError(
                f"tracking.uri={self.uri}: it must begin with one of {', '.join(SCHEMES)}. Set "
                f"tracking.uri=sqlite:///runs.db or tracking.uri=http://localhost:5000, or leave it out"
            )
        database = database_of(self.uri or "")
        if database and not database.parent.is_dir():
            raise ConfigError(
                f"tracking.uri={self.uri}: there is no folder {database.parent}. Create it, or set another address. In "
                f"an address, % is written as %25 and ? as %3F"
            )

    def address(self) -> str:
        """The full tracking address."""
        return self.uri or sqlite_address(OUTPUTS.resolve() / "mlflow.db")

    def database(self) -> Path | None:
        """The file of an SQLite store; None for other stores."""
        return database_of(self.address())

    def client(self) -> "MlflowClient":
        """A client of the store; a missing SQLite store is created first.

        That happens under a lock, since MLflow fails if several processes do it at once.

        Raises:
            TrackingError: where the experiment was deleted.
            Exception: whatever MLflow raises where the store is unreachable.
        """
        for name, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # they log at length what they also raise
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if self.uri is None:
            make_folder(OUTPUTS)
        database = self.database()
        # No lock for a server: one that hangs must not hold up other runs.
        with locks.acquired(Path(f"{database}.lock"), LOCK_TIMEOUT) if database else nullcontext():
            if database:
                _make_or_follow(database)
            client = MlflowClient(self.address())
            experiment = client.get_experiment_by_name(self.experiment)
            if experiment is None:
                # By default MLflow puts the artifacts of an SQLite store into the current folder, maybe read-only.
                beside = database or OUTPUTS / "mlflow.db"
                location = artifact_address(beside, self.experiment) if is_sqlite(self.address()) else None
                client.create_experiment(self.experiment, artifact_location=location)
            elif experiment.lifecycle_stage == "deleted":
                raise TrackingError(
                    f"tracking.experiment={self.experiment}: it was deleted. Restore it in MLflow, or set another name"
                )
        return client

    def experiment_id(self, client: "MlflowClient") -> str:
        """MLflow's id of the experiment; :meth:`client` has created it."""
        experiment = client.get_experiment_by_name(self.experiment)
        assert experiment is not None
        return str(experiment.experiment_id)

    def open_run(self, client: "MlflowClient", run: RunInfo, tags: Mapping[str, str]) -> str:
        """Start a run in the experiment, or reopen the one that an earlier call started; returns its id."""
        from mlflow.entities import RunTag

        session = {SESSION_TAG: run.sessions[-1]} if run.sessions else {}
        tags = {**run.tags, **tags, **owner_tags(run.run_dir), **session}
        identity = self.find_run(client, run)
        if identity is None:
            identity = self._create_run(client, run, tags)
        else:
            # The tags first: every running run names its process.
            client.log_batch(identity, tags=[RunTag(name, value) for name, value in tags.items()])
            client.update_run(identity, status="RUNNING")
        return identity

    def own_run(self, client: "MlflowClient", run: RunInfo) -> RunInfo:
        """``run``; with a new key where a copy of its folder has continued the run that is in the store."""
        if run.sessions and (identity := self.find_run(client, run)):
            last = client.get_run(identity).data.tags.get(SESSION_TAG)
            if last and last not in run.sessions:
                tell(f"{run.run_dir}: a copy of it has continued its MLflow run {identity}, so it gets a new one")
                return as_another_run(run)
        return run

    def open_parent(self, client: "MlflowClient", folder: Path) -> str | None:
        """The parent run of the sweep in ``folder``; the first job that gets here starts it."""
        if not (folder / SWEEP_RUN_FILE).exists():
            return None
        with locks.acquired(folder / ".mlflow.lock", LOCK_TIMEOUT):
            run = RunInfo.load(folder)
            identity = self.find_run(client, run)
            is_resumed = Outcome.of(folder) is None  # it may have been closed after an earlier session died
            if identity is None or (is_resumed and is_dead(client.get_run(identity).data.tags, identity)):
                return self.open_run(client, run, {})
            return identity

    def find_run(self, client: "MlflowClient", run: RunInfo) -> str | None:
        """The id of the run in this store, by the id in its folder or by its key; None where the store lacks it."""
        from mlflow.exceptions import MlflowException

        if identity := run_id(run.run_dir):
            try:
                return str(client.get_run(identity).info.run_id)
            except MlflowException as error:
                # Another store gets a new run with everything.
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
        write_atomically(run.run_dir / RUN_ID_FILE, f"{identity}\n")
        return identity


def _make_or_follow(database: Path) -> None:
    """Create a missing SQLite store atomically: it takes MLflow seconds, and a half-made store is useless."""
    if database.exists():
        follow_moved_store(database)
        return
    with atomic_path(database) as temporary:
        make_sqlite_store(temporary)


@contextmanager
def store_errors(problem: str, remedy: str) -> Iterator[None]:
    """Turn an error of the store into a ``TrackingError``. Errors of this package and bugs stay as they are."""
    try:
        yield
    except CifarExpError:
        raise
    except Exception as error:  # MLflow raises whatever its store does
        if is_bug(error):
            raise
        raise TrackingError(f"{problem}: {shortened(error)}. {remedy}") from error
