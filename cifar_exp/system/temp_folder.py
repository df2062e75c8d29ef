"""A temporary folder that is cleared away whatever becomes of its process: by itself, or by the next start."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cifar_exp.system.locks import HeldError, held

PREFIX = "cifar-exp-"
_LOCK = ".lock"


@contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder of mode 0700, removed when the block ends; those of processes that were killed go as well.

    Raises:
        OSError: where it cannot be made.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        _remove_abandoned(folder)
    folder = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))
    try:
        try:
            with held(folder / _LOCK, timeout=0):
                folder = folder.rename(folder.with_name(folder.name[1:]))  # held before another start can see it
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:  # the first signal raises, and may have cut that short; a second one does not
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove a folder that nobody holds: its process was killed before it could."""
    with suppress(OSError, HeldError):
        if (folder / _LOCK).exists() and folder.stat().st_uid == os.geteuid():
            with held(folder / _LOCK, timeout=0):
                shutil.rmtree(folder)
