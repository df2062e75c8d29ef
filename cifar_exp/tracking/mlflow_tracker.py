"""The MLflow tracker. Ranks never import MLflow. The parent process and the commands sync, report and ui do."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from cifar_exp.config.mlflow_settings import DEFAULT_EXPERIMENT
from cifar_exp.records.journal import read
from cifar_exp.records.run_folder import (
    OUTPUTS,
    Outcome,
    RunInfo,
    lock_run_folder,
    mark_delivered,
)
from cifar_exp.system.process import uv_prefix
from cifar_exp.system.redaction import masked_text
from cifar_exp.tracking.follower import BATCH
from cifar_exp.tracking.mlflow_run import MLflowRun, point_count
from cifar_exp.tracking.mlflow_store import MLflowStore
from cifar_exp.tracking.own_store import sync_command
from cifar_exp.tracking.store_problems import store_errors


@dataclass(frozen=True)
class MLflowTracker(MLflowStore):
    """Delivers runs to an MLflow store; :class:`MLflowStore` has the settings."""

    def sink(self, run: RunInfo) -> "MLflowRun":
        return MLflowRun(self, run)

    def store(self) -> str:
        is_id = self.experiment_id and not self.experiment
        experiment = f"id {self.experiment_id}" if is_id else (self.experiment or DEFAULT_EXPERIMENT)
        return f"{masked_text(self.uri or str(OUTPUTS / 'mlflow.db'))}, experiment {experiment}"

    def hint(self) -> str:
        address = masked_text(self.address())
        if address.startswith("databricks"):
            return ""
        if address.startswith("http"):
            return f"open {address} in a browser"
        return f"{uv_prefix()}mlflow ui --backend-store-uri {shlex.quote(address)}"

    def deliver(self, run_dir: Path) -> str:
        """Deliver the data of one run that the store lacks; returns one line about it.

        Raises:
            ConfigError: if the run is still training.
            TrackingError: if the store cannot be reached.
        """
        with lock_run_folder(run_dir):
            run, outcome = RunInfo.load(run_dir), Outcome.of(run_dir)
            status = outcome.status if outcome else "KILLED"
            entries = read(run_dir)
            sink = MLflowRun(self, run, restores=False)
            address = masked_text(self.address())
            with store_errors(
                f"tracking.uri={address}: {run_dir} could not be delivered",
                f"Nothing is lost: run {sync_command(run_dir)} once the store can be reached. Passwords are not "
                f"stored: if the address has one, append tracking.uri=<address>",
            ):
                sink.open()
                missing = sink.missing(entries)
                for start in range(0, len(missing), BATCH):
                    sink.write(missing[start : start + BATCH])
                sink.close(status)
            owed = mark_delivered(run_dir, self.store())
        return (
            f"{run_dir}: {point_count(missing)} of {point_count(entries)} points were missing and are now delivered, "
            f"{len(sink.artifacts())} files, {status}: run {sink.run_id} in {address}"
            + (f"; {owed} still lacks points of it" if owed else "")
        )
