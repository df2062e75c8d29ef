"""Files that are written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from cifar_exp.errors import storage_errors

_UNFINISHED = "unfinished-"


@contextmanager
def locked(file: Path, advice: str) -> Iterator[None]:
    """Hold a lock file against other processes and threads; its folder is made if missing.

    Raises:
        StorageError: the folder cannot be written; the message ends with ``advice``.
    """
    with storage_errors(file.parent, advice):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file).acquire()
    with lock:
        yield


def remove_leftovers(cache: Path) -> None:
    """Remove what a dead process left of :func:`new_folder`; to be called by who holds the lock, as a live one does."""
    for leftover in cache.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, renamed to ``folder`` when the block ends: that is whole whenever it is there at all."""
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder.parent))
    try:
        unfinished.chmod(0o755)  # mkdtemp's 0700 would keep a shared cache from everyone else
        yield unfinished
        shutil.rmtree(folder, ignore_errors=True)  # one that was not whole
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def durable(path: Path) -> Iterator[BinaryIO]:
    """A new file, on disk when the block ends: else a crash might keep the folder's new name and lose the content."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that a reader sees the whole of it or what was there before."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint, which is on disk, must not outlive what tells whose it is
        temporary.replace(path)
    except BaseException:  # signals raise, too
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Make a file that is whole, and on disk, whenever it is there under its name.

    Raises:
        OSError: where the file system refuses; nothing is left behind.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name is on disk too
    finally:
        os.close(folder)
