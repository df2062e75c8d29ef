"""Trackers: what takes the record of runs. MLflow is reached from the parent process alone, never from a rank."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_exp.errors import CifarExpError, TrackingError
from cifar_exp.records.journal import read
from cifar_exp.records.run_folder import (
    OUTPUTS,
    Outcome,
    RunInfo,
    claim,
    settle,
    sync_command,
)
from cifar_exp.system.process import uv_prefix
from cifar_exp.system.redaction import masked_text
from cifar_exp.tracking.follower import BATCH, shortened
from cifar_exp.tracking.mlflow_run import MLflowRun, _points
from cifar_exp.tracking.mlflow_store import MLflowStore

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class MLflowTracker(MLflowStore):
    """Delivers runs to an MLflow store, see :class:`MLflowStore` for the settings."""

    def sink(self, run: RunInfo) -> "MLflowRun":
        return MLflowRun(self, run)

    def store(self) -> str:
        return f"{masked_text(self.uri or str(OUTPUTS / 'mlflow.db'))}, experiment {self.experiment}"

    def hint(self) -> str:
        address = masked_text(self.address())
        if address.startswith("http"):
            return f"open {address} in a browser"
        return f"{uv_prefix()}mlflow ui --backend-store-uri {shlex.quote(address)}"

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
