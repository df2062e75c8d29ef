"""Atomic writes: readers of a file or a folder see the old content or the new content, never a part of it.

Files and folders that must never be read half-written are written here; the journal and locks are not. The policy:

- New content goes into a temporary file beside the target, ``.<name>.cifar-exp-tmp``, and is renamed when it is
  complete. No other program gives files such names. A download keeps its own partial file to be resumed, and
  :func:`complete` renames that one.
- Content and name are forced to disk (``fsync``), so that either version survives a crash of the machine. A file that
  nobody needs after such a crash is written with ``durable=False``.
- Where writing fails or a signal interrupts it, the temporary file is removed. After SIGKILL it stays, and the next
  write of the same file replaces it.
"""

import csv
import errno
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cifar_exp.system.marked_folders import MARK, is_marked, mark

CANNOT = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}  # a file system lacks a call
_UNFINISHED = "unfinished-"


def write_atomically(path: Path, content: bytes | str, durable: bool = True) -> None:
    """Write a file atomically; text as UTF-8.

    Raises:
        OSError: the file cannot be written; the old content stays and nothing else is left behind.
    """
    with atomic_path(path, durable) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as JSON atomically."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV atomically. The first row's keys are the heading."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


@contextmanager
def atomic_path(path: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary path to write a file to; the file is renamed to ``path`` when the block ends."""
    temporary = path.with_name(f".{path.name}.cifar-exp-tmp")
    try:
        temporary.unlink(missing_ok=True)  # left by a process that was killed, or a link
        yield temporary
        complete(temporary, path, durable)
    except BaseException:  # signals raise, too
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def complete(unfinished: Path, path: Path, durable: bool = True) -> None:
    """Rename a file to ``path`` once its content is complete. Both are in the same folder."""
    if durable:
        _sync_file(unfinished)
    unfinished.replace(path)
    if durable:
        _sync_names(path.parent)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write files to; it replaces ``folder`` when the block ends."""
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder.parent))
    try:
        mark(unfinished)
        with suppress(OSError):  # a file system without modes
            unfinished.chmod(0o755)  # mkdtemp's 0700 would keep a shared cache from other users
        yield unfinished
        for file in unfinished.iterdir():
            _sync_file(file)
        _sync_names(unfinished)
        shutil.rmtree(folder, ignore_errors=True)  # an incomplete one
        unfinished.rename(folder)
        (folder / MARK).unlink()
        _sync_names(folder.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_unfinished(parent: Path) -> None:
    """Remove folders that killed processes left in :func:`atomic_folder`. The caller holds the lock of ``parent``."""
    for folder in parent.glob(f"{_UNFINISHED}*"):
        if is_marked(folder):
            shutil.rmtree(folder, ignore_errors=True)


def force_to_disk(descriptor: int) -> None:
    """Force a file's content to disk (fsync), if its file system supports that.

    Raises:
        OSError: the disk is full or broken.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT:
            raise


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        force_to_disk(descriptor)
    finally:
        os.close(descriptor)


def _sync_names(folder: Path) -> None:
    """Force the names in a folder to disk.

    Network file systems refuse it, with an error of their own choice. The files are complete then, under their names.
    """
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
