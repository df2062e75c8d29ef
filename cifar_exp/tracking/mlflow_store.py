"""The MLflow store: its address, its experiment, opening and finding runs."""

from pathlib import Path
from typing import Any

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


def _make_store(path: Path) -> None:
    """Make an SQLite store whole or not at all: MLflow takes seconds for it, and cannot go on with a half-made one."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)  # of a process that was killed
    make: Any = SqlAlchemyStore
    make(f"sqlite:///{unfinished}", path.parent.resolve().as_uri()).engine.dispose()
    unfinished.replace(path)
