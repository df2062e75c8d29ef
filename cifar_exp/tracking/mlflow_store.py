"""The MLflow store: its address, its experiment, opening and finding runs."""

import logging
import os
import sqlite3
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cifar_exp.config.mlflow_settings import checked_address
from cifar_exp.errors import ConfigError, TrackingError
from cifar_exp.records.journal import RUN_ID_FILE, run_id
from cifar_exp.records.run_folder import OUTPUTS, SWEEP_RUN_FILE, Outcome, RunInfo, make_folder
from cifar_exp.records.run_identity import as_another_run
from cifar_exp.system import locks
from cifar_exp.system.atomic_files import atomic_path, write_atomically
from cifar_exp.system.printable import print_notice
from cifar_exp.tracking.bounded_client import BoundedClient
from cifar_exp.tracking.dead_runs import is_dead, owner_tags
from cifar_exp.tracking.experiment import NOT_FOUND_CODES, ExperimentChoice, mlflow_command
from cifar_exp.tracking.mlflow_items import PARAMS_OR_TAGS, log_each, with_allowed_names
from cifar_exp.tracking.store_address import (
    database_of,
    follow_moved_store,
    is_sqlite,
    make_sqlite_store,
    sqlite_address,
)
from cifar_exp.tracking.store_problems import NoMLflowError, check_variables, optional_modules

if TYPE_CHECKING:
    from mlflow import MlflowClient

MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # MLflow would print the address with its password
    # Callers retry. MLflow's own retry would create a run twice if only the response was lost.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds without data
}
LOCK_TIMEOUT = 60.0  # seconds; eight simultaneous starts wait for the first one, which creates the store
KEY_TAG = "run_key"
SESSION_TAG = "session"  # the last session that trained the run
PARENT_TAG = "mlflow.parentRunId"
ADOPTED_TAG = "adopted"  # the run existed before, and this package's run continues it


@dataclass(frozen=True)
class MLflowStore:
    """An MLflow store, by default SQLite and artifacts under ``outputs/``.

    Attributes:
        uri: MLflow's tracking address; None is the store under ``outputs/``.
        experiment: the name of the runs' experiment, created if missing; None is ``cifar-exp``.
        experiment_id: MLflow's id of the experiment, if no name is given.
        run_name: the name of a single run, or of a sweep's parent run.
        run_id: MLflow's id of an existing run that a single run or a sweep's parent run continues.
    """

    uri: str | None = None
    experiment: str | None = None
    experiment_id: str | None = None
    run_name: str | None = None
    run_id: str | None = None

    def __post_init__(self) -> None:
        if self.uri is None:
            return
        object.__setattr__(self, "uri", checked_address(self.uri, "tracking.uri"))
        database = database_of(self.uri)
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

        The store is created under a lock, since MLflow fails if several processes create it at once.

        Raises:
            TrackingError: if the experiment was deleted, or a variable of MLflow has a value that it cannot read.
            Exception: any exception that MLflow raises if the store is unreachable.
        """
        _set_up_mlflow()
        if self.uri is None:
            make_folder(OUTPUTS)
        database = self.database()
        # No lock for a server: a server that hangs must not block other runs.
        with locks.acquired(Path(f"{database}.lock"), LOCK_TIMEOUT) if database else nullcontext():
            if database:
                _make_or_follow(database)
            with optional_modules(self.address()):
                client = self._new_client()
            beside = database or OUTPUTS / "mlflow.db"
            self._experiment().make(client, beside if is_sqlite(self.address()) else None)
        return client

    def reading_client(self) -> "MlflowClient":
        """A client of a store that exists; nothing is created in it."""
        _set_up_mlflow()
        if database := self.database():
            with suppress(sqlite3.Error):  # a store that is read-only or in use is read as it is
                follow_moved_store(database)
        return self._new_client()

    def _new_client(self) -> "MlflowClient":
        from mlflow import MlflowClient

        client: Any = MlflowClient(self.address())
        return client if is_sqlite(self.address()) else cast("MlflowClient", BoundedClient(client, self.address()))

    def _experiment(self) -> ExperimentChoice:
        return ExperimentChoice(self.experiment, self.experiment_id, self.address(), self.uri is not None)

    def id_of_experiment(self, client: "MlflowClient") -> str:
        """MLflow's id of the experiment; :meth:`client` has created it."""
        return self._experiment().identity(client)

    def open_run(self, client: "MlflowClient", run: RunInfo, tags: Mapping[str, str], restores: bool = True) -> str:
        """Start a run in the experiment, or reopen the one that an earlier call started; returns its id.

        Args:
            client: of this store.
            run: the run.
            tags: added to the run's own tags.
            restores: whether a run that was deleted in MLflow is restored.

        Raises:
            TrackingError: the run was deleted and ``restores`` is false.
        """
        from mlflow.entities import RunTag

        session = {SESSION_TAG: run.sessions[-1]} if run.sessions else {}
        first = {**owner_tags(run.run_dir), **tags, **session}
        identity = self.find_run(client, run)
        if identity is None and self.run_id and run.sweep_dir is None:
            identity = self._adopted_run(client, run)
        if identity is None:
            identity = self._create_run(client, run, first)
        else:
            self._restore(client, run, identity, restores)
        # The tags first: every running run names its process.
        marks = [RunTag(name, value) for name, value in with_allowed_names({**first, **run.tags}).items()]
        log_each(marks, PARAMS_OR_TAGS, lambda some: client.log_batch(identity, tags=some), set())
        client.update_run(identity, status="RUNNING")
        return identity

    def _restore(self, client: "MlflowClient", run: RunInfo, identity: str, restores: bool) -> None:
        if client.get_run(identity).info.lifecycle_stage != "deleted":
            return
        command = mlflow_command(self.address(), f"runs restore --run-id {identity}")
        if not restores:
            raise TrackingError(
                f"{run.run_dir}: its run {identity} was deleted in MLflow. Restore it with {command}, or remove "
                f"{run.run_dir / RUN_ID_FILE} for a new run"
            )
        client.restore_run(identity)
        print_notice(f"{run.run_dir}: its run {identity} was deleted in MLflow and is restored, since it continues")

    def _adopted_run(self, client: "MlflowClient", run: RunInfo) -> str | None:
        """The existing run that ``run_id`` names, now this package's run; None if it cannot be continued."""
        from mlflow.exceptions import MlflowException

        assert self.run_id
        problem = "the store has no such run"
        try:
            found = client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code not in NOT_FOUND_CODES:
                raise
        else:
            if found.info.lifecycle_stage != "deleted" and found.data.tags.get(KEY_TAG, run.key) == run.key:
                client.set_tag(self.run_id, ADOPTED_TAG, "true")
                client.set_tag(self.run_id, KEY_TAG, run.key)
                if self.run_name:
                    client.update_run(self.run_id, name=self.run_name)
                return self._note(run, self.run_id)
            is_deleted = found.info.lifecycle_stage == "deleted"
            problem = "that run was deleted" if is_deleted else "another run has continued that run"
        print_notice(f"tracking.run_id={self.run_id} (MLFLOW_RUN_ID): {problem}, so a new run is made")
        return None

    def own_run(self, client: "MlflowClient", run: RunInfo) -> RunInfo:
        """If a copy of the folder continued this MLflow run, give this run a new key."""
        if run.sessions and (identity := self.find_run(client, run)):
            last = client.get_run(identity).data.tags.get(SESSION_TAG)
            if last and last not in run.sessions:
                print_notice(
                    f"{run.run_dir}: a copy of it has continued its MLflow run {identity}, so it gets a new one"
                )
                return as_another_run(run)
        return run

    def open_parent(self, client: "MlflowClient", folder: Path, restores: bool = True) -> str | None:
        """The parent run of the sweep in ``folder``. The first job that calls this starts it."""
        if not (folder / SWEEP_RUN_FILE).exists():
            return None
        with locks.acquired(folder / ".mlflow.lock", LOCK_TIMEOUT):
            run = RunInfo.load(folder)
            identity = self.find_run(client, run)
            is_resumed = Outcome.of(folder) is None  # it may have been closed after an earlier session died
            if identity is None or (is_resumed and is_dead(client.get_run(identity).data.tags, identity)):
                return self.open_run(client, run, {}, restores)
            return identity

    def find_run(self, client: "MlflowClient", run: RunInfo) -> str | None:
        """The id of the run in this store, by the id in its folder or by its key; None if the store lacks it."""
        from mlflow.exceptions import MlflowException

        if identity := run_id(run.run_dir):
            try:
                return str(client.get_run(identity).info.run_id)
            except MlflowException as error:
                # Another store gets a new run with everything.
                if error.error_code not in NOT_FOUND_CODES:
                    raise
        if not run.key:
            return None
        found = client.search_runs([self.id_of_experiment(client)], f"tags.{KEY_TAG} = '{run.key}'", max_results=1)
        if not found:
            return None
        return self._note(run, found[0].info.run_id)

    def _create_run(self, client: "MlflowClient", run: RunInfo, tags: Mapping[str, str]) -> str:
        created = client.create_run(
            self.id_of_experiment(client),
            start_time=round(run.started * 1000),
            tags={**tags, KEY_TAG: run.key} if run.key else dict(tags),
            run_name=run.name if run.sweep_dir else self.run_name or run.name,
        )
        if not created.info.run_id:
            raise NoMLflowError("the server's answer names no run")
        return self._note(run, created.info.run_id)

    def _note(self, run: RunInfo, identity: str) -> str:
        write_atomically(run.run_dir / RUN_ID_FILE, f"{identity}\n")
        return identity


def _set_up_mlflow() -> None:
    """Set this package's defaults of MLflow's variables and silence its log.

    Raises:
        TrackingError: a variable of MLflow has a value that it cannot read.
    """
    for name, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(name, value)
    check_variables()
    for name in ("mlflow", "alembic"):  # they log errors that they also raise; importing MLflow resets the level
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _make_or_follow(database: Path) -> None:
    """Create a missing SQLite store atomically: MLflow takes seconds for it, and an incomplete store is useless."""
    if database.exists():
        follow_moved_store(database)
        return
    with atomic_path(database) as temporary:
        make_sqlite_store(temporary)
