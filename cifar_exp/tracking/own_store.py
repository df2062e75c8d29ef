"""Which MLflow store a run folder may name. The folder may come from another user, and runs are sent to the store."""

import shlex
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cifar_exp.config.arguments import argument
from cifar_exp.config.mlflow_settings import from_environment
from cifar_exp.config.stored import stored_config
from cifar_exp.errors import ConfigError, StorageError
from cifar_exp.records import run_folder
from cifar_exp.records.run_folder import CONFIG_FILE, MULTIRUN_FILE, OUTPUTS
from cifar_exp.system.printable import printable
from cifar_exp.system.redaction import masked_text

_SQLITE = "sqlite:///"


def stored_tracking(run_dir: Path) -> dict[str, Any]:
    """The section ``tracking`` of a run's or sweep's configuration.

    Raises:
        StorageError: if it cannot be read or names no tracker.
    """
    path = next((path for path in (run_dir / CONFIG_FILE, run_dir / MULTIRUN_FILE) if path.exists()), run_dir)
    try:
        section: Any = stored_config(path).get("tracking")
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise StorageError(f"{path}: the run's configuration cannot be read: {error}. Restore that file") from error
    texts = (section.get(name) for name in ("uri", "experiment", "experiment_id")) if isinstance(section, dict) else [0]
    is_sound = all(text is None or isinstance(text, str) for text in texts)
    if not is_sound or not isinstance(section.get("_target_"), str):
        raise StorageError(f"{path}: the run's configuration cannot be read: it names no tracker. Restore that file")
    return dict(section)


def own_address(uri: str | None, run_dir: Path) -> str | None:
    """The address of the store that a run's folder names, if it is known to be the user's own.

    That is the default store, the one in ``MLFLOW_TRACKING_URI``, or an SQLite store in ``outputs/`` or in the current
    folder.

    Args:
        uri: from the folder, without a password; None: ``MLFLOW_TRACKING_URI``, else the default store.
        run_dir: the folder.

    Raises:
        ConfigError: it is another store.
    """
    environment = from_environment("uri")
    if not uri:
        return environment
    if environment and uri.rstrip("/") == masked_text(environment):
        return environment  # with its password
    if _is_own_file(uri, run_dir):
        return uri
    typed = argument("tracking.uri", uri)
    raise ConfigError(
        f"tracking.uri={printable(uri)}: the folder {printable(run_dir)} names that store, and anybody may have made "
        f"the folder. If it is your store, run cifar-exp sync {shlex.quote(printable(run_dir))} {printable(typed)}"
    )


def sync_command(folder: Path) -> str:
    """The `cifar-exp sync` command that delivers what the tracker lacks, with ``tracking.uri`` if it is needed."""
    command = run_folder.plain_sync_command(folder)
    with suppress(StorageError):
        uri = stored_tracking(folder).get("uri")
        try:
            own_address(uri, folder)
        except ConfigError:
            return f"{command} {argument('tracking.uri', uri)}"
    return command


def _is_own_file(uri: str, run_dir: Path) -> bool:
    """Whether the address is a file in ``outputs/`` or the current folder, not in ``run_dir``. It need not exist."""
    name = uri.removeprefix(_SQLITE)
    if name == uri or not name or {"?", ":", "%"} & {*name}:
        return False
    path, folder = Path(name).resolve(), run_dir.resolve()
    if path.parent not in (OUTPUTS.resolve(), Path.cwd()) or path.is_relative_to(folder):
        return False
    return not path.exists() or is_store(path)


def is_store(database: Path) -> bool:
    """Whether a file is an SQLite database of MLflow."""
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
        found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        return {("experiments",), ("runs",), ("alembic_version",)} <= {*found}
    return False


def foreign_place(database: Path) -> str | None:
    """The place of an SQLite store's run files, if that is on another machine or outside the store's folder.

    MLflow's pages show each file there. A folder that does not exist, as after a move of the store, does not count.
    """
    query = "SELECT artifact_location FROM experiments UNION SELECT artifact_uri FROM runs"
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as store:
        for (place,) in store.execute(query):
            if place and not is_beside(str(place), database):
                return str(place)
    return None


def is_beside(place: str, database: Path) -> bool:
    """Whether a place for files is in the folder of an SQLite store or in the current one, or does not exist."""
    parts = urlsplit(place)
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost"):
        return parts.scheme == "mlflow-artifacts" and not parts.netloc
    path = Path(unquote(parts.path) if parts.scheme else place)
    with suppress(OSError, ValueError):  # a name that no file can have
        path = path.resolve()
        own = (database.resolve().parent, Path.cwd())
        return any(path.is_relative_to(folder) for folder in own) or not path.exists()
    return True
