"""The settings of the MLflow store: from the command line, else MLflow's environment variables, else the default."""

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from cifar_exp.errors import ConfigError
from cifar_exp.system.redaction import masked_text

MLFLOW_TRACKER = "cifar_exp.tracking.mlflow_tracker.MLflowTracker"
DEFAULT_EXPERIMENT = "cifar-exp"
TRACKING_URI = "MLFLOW_TRACKING_URI"
# Setting of the section `tracking` -> the variable that MLflow's own programs read.
VARIABLES = {
    "uri": TRACKING_URI,
    "experiment": "MLFLOW_EXPERIMENT_NAME",
    "experiment_id": "MLFLOW_EXPERIMENT_ID",
    "run_name": "MLFLOW_RUN_NAME",
    "run_id": "MLFLOW_RUN_ID",
}
SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")


def from_environment(name: str) -> str | None:
    """The value of the variable of the setting ``tracking.<name>``; None if it is unset or empty.

    Raises:
        ConfigError: it is no address of a store.
    """
    value = os.environ.get(VARIABLES[name], "").strip()
    if name == "uri" and value:
        return checked_address(value, TRACKING_URI)
    return value or None


def with_environment(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``tracking`` with MLflow's environment variables for what is not set. Other trackers stay as is.

    A preset or a typed value of ``experiment`` or ``experiment_id`` wins over both variables. Ids belong to a store:
    those of the environment do not count where another store than that of ``MLFLOW_TRACKING_URI`` is typed.

    Raises:
        ConfigError: ``MLFLOW_TRACKING_URI`` is no address of a store.
    """
    filled = dict(section)
    if section.get("_target_") != MLFLOW_TRACKER:
        return filled
    experiment = next((name for name in ("experiment", "experiment_id") if section.get(name)), None)
    given = from_environment("uri")
    is_other_store = given is not None and section.get("uri") not in (None, given)
    for name in VARIABLES:
        if is_other_store and name.endswith("_id"):
            continue
        is_experiment = name in ("experiment", "experiment_id")
        if section.get(name) is None and not (is_experiment and experiment):
            filled[name] = from_environment(name)
            experiment = name if is_experiment and filled[name] else experiment
    if experiment is None:
        filled["experiment"] = DEFAULT_EXPERIMENT
    return filled


def variables_in(section: Mapping[str, Any]) -> str:
    """Which of MLflow's variables give settings of the section, and which are overridden; as text, maybe empty."""
    given = {name: value for name in VARIABLES if (value := from_environment(name))}
    used = [VARIABLES[name] for name, value in given.items() if section.get(name) == value]
    lost = [VARIABLES[name] for name, value in given.items() if section.get(name) != value]
    parts = [f"from {', '.join(used)}"] if used else []
    return "; ".join([*parts, *(f"{name} is overridden" for name in lost)])


def checked_address(uri: str, name: str) -> str:
    """The address of a store, without slashes at its end.

    Args:
        uri: as given.
        name: of the setting, variable or option that gives it.

    Raises:
        ConfigError: it is no address of a store.
    """
    shown = f"{name}={masked_text(uri)}"
    setting = name if name.startswith("--") else "tracking.uri"
    remedy = f"Set {setting}=sqlite:///runs.db or {setting}=http://localhost:5000"
    scheme = uri.partition(":")[0].lower().partition("+")[0]
    if scheme == "file" or (scheme not in SCHEMES and "://" not in uri and (uri[:1] in "./~" or "/" in uri)):
        raise ConfigError(
            f"{shown}: it is a folder, and MLflow no longer supports folders as stores. {remedy}; mlflow "
            f"migrate-filestore copies the runs of the folder"
        )
    if scheme not in SCHEMES:
        raise ConfigError(f"{shown}: it must begin with one of {', '.join(SCHEMES)}. {remedy}, or leave it out")
    if not scheme.startswith("http"):
        return uri
    try:
        parts = urlsplit(uri)
        is_host = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port or an IPv6 address
        is_host = False
    if not is_host:
        raise ConfigError(f"{shown}: it has no host. {remedy}")
    if parts.fragment or parts.query or "#" in uri:
        page = masked_text(uri).partition("#")[0].partition("?")[0].rstrip("/")
        raise ConfigError(f"{shown}: it is the address of a page, not of the server. Set {setting}={page}")
    return f"{scheme}:{uri.partition(':')[2]}".rstrip("/")
