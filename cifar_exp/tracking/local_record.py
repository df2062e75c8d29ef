"""A run in the user's own SQLite store, which may have more than its folder: edits in MLflow, other programs' data."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from cifar_exp.errors import ConfigError, TrackingError
from cifar_exp.records.journal import run_id
from cifar_exp.records.run_folder import RunInfo
from cifar_exp.system.printable import print_notice
from cifar_exp.tracking.dead_runs import FOLDER_TAG, PREFIX
from cifar_exp.tracking.experiment import NOT_FOUND_CODES
from cifar_exp.tracking.mlflow_store import KEY_TAG, PARENT_TAG, SESSION_TAG, MLflowStore
from cifar_exp.tracking.own_store import is_beside, is_store, own_address, stored_tracking
from cifar_exp.tracking.store_problems import store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric, Run

# These tags hold for one store or one process: ids of other runs, the process that logged the run.
STORE_TAGS = (KEY_TAG, SESSION_TAG, PARENT_TAG, FOLDER_TAG, "mlflow.runName", "mlflow.log-model.history")


@dataclass(frozen=True)
class LocalRecord:
    """A run in the user's own SQLite store.

    Attributes:
        run: MLflow's record of it.
        experiment: the name of its experiment.
        database: the file of the store.
    """

    run: "Run"
    experiment: str
    database: Path
    _client: "MlflowClient"

    def tags(self) -> dict[str, str]:
        """Its tags, without those that hold for this store or process only."""
        tags = self.run.data.tags
        return {name: value for name, value in tags.items() if name not in STORE_TAGS and not name.startswith(PREFIX)}

    def params(self) -> Mapping[str, str]:
        return dict(self.run.data.params)

    def history(self) -> "Iterator[tuple[str, list[Metric]]]":
        """All points of each metric."""
        for name in self.run.data.metrics:
            yield name, self._client.get_metric_history(self.run.info.run_id, name)

    def datasets(self) -> "list[DatasetInput]":
        return list(self.run.inputs.dataset_inputs) if self.run.inputs else []

    def files(self) -> Iterator[tuple[Path, str]]:
        """Its files with the folder in the run's artifacts that each is in. Links are not followed.

        The store's file may come from somebody else. So only files of the run's own folder beside the store count.
        """
        identity, place = str(self.run.info.run_id), str(self.run.info.artifact_uri)
        parts = urlsplit(place)
        if parts.scheme not in ("", "file") or not parts.path.endswith(f"/{identity}/artifacts"):
            return
        if not is_beside(place, self.database):
            return
        top = Path(unquote(parts.path) if parts.scheme else place)
        for folder, _, names in os.walk(top):
            for name in sorted(names):
                path = Path(folder) / name
                if path.is_file() and not path.is_symlink():
                    inner = Path(folder).relative_to(top).as_posix()
                    yield path, "" if inner == "." else inner


def local_record(run: RunInfo) -> LocalRecord | None:
    """The record of the run in folder's SQLite store, if that store is the user's own; else None.

    The folder may come from anybody and name any run of that store. So the record counts only if it has the run's key.
    """
    with suppress(ConfigError):  # another store: the folder's own files are copied
        store = MLflowStore(own_address(stored_tracking(run.run_dir).get("uri"), run.run_dir))
        database, identity = store.database(), run_id(run.run_dir)
        if database and identity and run.key and is_store(database.absolute()):
            try:
                with store_errors(f"{database}: the store cannot be read", "The run is copied from its folder alone"):
                    return _record(store, database, identity, run.key)
            except TrackingError as error:
                print_notice(error)
    return None


def _record(store: MLflowStore, database: Path, identity: str, key: str) -> LocalRecord | None:
    from mlflow.exceptions import MlflowException

    client = store.reading_client()
    try:
        run = client.get_run(identity)
    except MlflowException as error:
        if error.error_code not in NOT_FOUND_CODES:
            raise
        return None
    if run.data.tags.get(KEY_TAG) != key:
        return None
    return LocalRecord(run, str(client.get_experiment(run.info.experiment_id).name), database.absolute(), client)
