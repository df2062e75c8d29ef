"""Convert paths to addresses of an SQLite store and of its files, and fix the addresses after its folder was moved.

``?``, ``#`` and ``%`` have another meaning in an address than in a path. So addresses are built only here.
"""

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ARTIFACTS = "artifacts"  # the folder beside the database
# Columns of MLflow's tables that hold the address of a folder, and the tag that holds the path of a run's folder.
ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def sqlite_address(database: Path) -> str:
    """The tracking address of an SQLite store in the file ``database``."""
    from sqlalchemy.engine import URL

    path = str(database.absolute())
    address = URL.create("sqlite", database=path).render_as_string()
    # MLflow treats the text after sqlite:/// as a path and creates that folder. If the driver is named, it does not.
    return address if address == f"sqlite:///{path}" else address.replace("sqlite:", "sqlite+pysqlite:", 1)


def database_of(address: str) -> Path | None:
    """The file of an SQLite store; None for other stores, one in memory, and SQLite's own ``file:`` addresses."""
    if not is_sqlite(address):
        return None
    from sqlalchemy.engine import make_url

    name = make_url(address).database or ""
    return None if name in ("", ":memory:") or name.startswith("file:") else Path(name)


def is_sqlite(address: str) -> bool:
    """Whether the address belongs to an SQLite store."""
    return address.partition(":")[0].partition("+")[0] == "sqlite"


def artifact_address(database: Path, experiment: str) -> str:
    """The address of the folder for an experiment's artifacts, beside the database."""
    return artifact_folder(database.parent, experiment).as_uri()


def artifact_folder(beside: Path, experiment: str) -> Path:
    """The folder for files of an experiment. A name such as ``/Users/me/x`` or ``../x`` does not lead out of it."""
    return (beside / ARTIFACTS).resolve() / _file_name(experiment)


def _file_name(experiment: str) -> str:
    name = re.sub(r"[/\\\0]", "_", experiment)
    return "_" if name in ("", ".", "..") else name


def make_sqlite_store(database: Path) -> None:
    """Create an empty store. Its default experiment records the folder in which the store was created."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    make: Any = SqlAlchemyStore
    make(sqlite_address(database), database.parent.resolve().as_uri()).engine.dispose()


def follow_moved_store(database: Path) -> None:
    """Point a store's runs and experiments to the files in its folder after the folder was moved or copied.

    MLflow keeps absolute addresses. Without this, files of new runs go to the folder's old place. If only the database
    was copied and the artifacts stayed in the old place, nothing is changed.

    Raises:
        sqlite3.Error: the database cannot be read or written.
    """
    new = database.parent.resolve()
    with closing(sqlite3.connect(database)) as store, store:
        for old in _folders_before(store, new):
            for table, column in ADDRESSES:
                if any(row[1] == column for row in store.execute(f"PRAGMA table_info({table})")):
                    _replace_start(store, table, column, f"{old.as_uri()}/", f"{new.as_uri()}/")
            _replace_start(store, "tags", "value", f"{old}/", f"{new}/", "AND key = 'folder'")


def _folders_before(store: sqlite3.Connection, new: Path) -> set[Path]:
    """The folders that the store was in before it was moved to ``new``, from the addresses of its experiments.

    A folder that a user chose for artifacts does not count: it still exists, and the store was not created in it.
    """
    made_in, found = None, set()
    for identity, name, location in store.execute("SELECT experiment_id, name, artifact_location FROM experiments"):
        if not str(location).startswith("file:///"):
            continue
        path = Path(unquote(urlsplit(location).path))
        if identity == 0:  # the default experiment, see `make_sqlite_store`
            made_in = path.parent
        elif path.parts[-2:] == (ARTIFACTS, _file_name(name)) and path.parents[1] != new:
            found.add(path.parents[1])
    is_here = (new / ARTIFACTS).exists()
    return {old for old in found if (is_here or old == made_in) and (old == made_in or not old.exists())}


def _replace_start(store: sqlite3.Connection, table: str, column: str, old: str, new: str, more: str = "") -> None:
    """``table``, ``column`` and ``more`` are constants of this module; the addresses are passed as values."""
    changed = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ? {more}"
    store.execute(changed, (new, len(old) + 1, len(old), old))
