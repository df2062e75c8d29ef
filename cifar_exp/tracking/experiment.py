"""The experiment that runs belong to in an MLflow store."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_exp.config.mlflow_settings import DEFAULT_EXPERIMENT
from cifar_exp.errors import TrackingError
from cifar_exp.system.printable import print_notice
from cifar_exp.system.process import uv_prefix
from cifar_exp.system.redaction import masked_text
from cifar_exp.tracking.store_address import artifact_address
from cifar_exp.tracking.store_problems import NoMLflowError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

NOT_FOUND_CODES = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # the latter: not an id


def mlflow_command(address: str, words: str) -> str:
    """A command of MLflow for the store at ``address``."""
    return f"MLFLOW_TRACKING_URI={shlex.quote(masked_text(address))} {uv_prefix()}mlflow {words}"


@dataclass(frozen=True)
class ExperimentChoice:
    """An experiment by its name, or by its id if no name is given.

    Attributes:
        given_name: its name; None is ``cifar-exp``.
        given_id: MLflow's id of it.
        address: of the store.
        is_chosen_store: whether the store was chosen too; else it is the one under ``outputs/``.
    """

    given_name: str | None
    given_id: str | None
    address: str
    is_chosen_store: bool

    @property
    def name(self) -> str:
        """The experiment's name; used if it has no id."""
        return self.given_name or DEFAULT_EXPERIMENT

    def make(self, client: "MlflowClient", beside: Path | None) -> None:
        """Create the experiment if it is missing.

        Args:
            client: of the store.
            beside: the file of an SQLite store; None for a server, which knows its own place for files.

        Raises:
            TrackingError: if the experiment was deleted, or the store has no experiment with that id.
        """
        found = self._found(client) or self._default_experiment(client) or self._created(client, beside)
        if found is None:
            return
        if not found.experiment_id:
            raise NoMLflowError("the server's answer names no experiment")
        if found.lifecycle_stage == "deleted":
            command = mlflow_command(self.address, f"experiments restore --experiment-id {found.experiment_id}")
            raise TrackingError(
                f"tracking.experiment={found.name}: it was deleted in MLflow. Restore it with {command}, or set "
                f"tracking.experiment=<another name>"
            )

    def identity(self, client: "MlflowClient") -> str:
        """MLflow's id of the experiment, which :meth:`make` has created."""
        experiment = self._found(client) or client.get_experiment_by_name(self.name)
        assert experiment is not None
        return str(experiment.experiment_id)

    def _found(self, client: "MlflowClient") -> "Experiment | None":
        from mlflow.exceptions import MlflowException

        if not self.given_id or self.given_name:
            return client.get_experiment_by_name(self.name)
        try:
            return client.get_experiment(self.given_id)
        except MlflowException as error:
            if error.error_code not in NOT_FOUND_CODES:
                raise
            return None

    def _default_experiment(self, client: "MlflowClient") -> "Experiment | None":
        """The experiment with the default name, for an id that belongs to another store."""
        if not self.given_id or self.given_name:
            return None
        problem = f"tracking.experiment_id={self.given_id}: {masked_text(self.address)} has no such experiment"
        if self.is_chosen_store:
            raise TrackingError(f"{problem}. Set tracking.experiment=<name>, or unset MLFLOW_EXPERIMENT_ID")
        # The id may come from mlflow.set_experiment in a notebook, which uses MLflow's own default store.
        print_notice(f"{problem}, so the run goes to {self.name}. For another store set tracking.uri")
        return client.get_experiment_by_name(self.name)

    def _created(self, client: "MlflowClient", beside: Path | None) -> "Experiment | None":
        """Create it. Returns the experiment if another process created it first, else None."""
        from mlflow.exceptions import MlflowException

        # By default MLflow puts the artifacts of an SQLite store into the current folder, maybe read-only.
        location = artifact_address(beside, self.name) if beside else None
        try:
            if client.create_experiment(self.name, artifact_location=location):
                return None
            raise NoMLflowError("the server's answer names no experiment")
        except MlflowException:
            found = client.get_experiment_by_name(self.name)
            if found is None:
                raise
            return found
