"""A private temporary folder. Its process removes it, or the next start if the process was killed."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cifar_exp.system.locks import HeldError, acquired
from cifar_exp.system.marked_folders import is_marked, mark

PREFIX = "cifar-exp-"
_LOCK = ".lock"


@contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder of mode 0700, removed when the block ends. Folders of killed processes are removed, too.

    Raises:
        OSError: the folder cannot be created.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        _remove_abandoned(folder)
    folder = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))
    try:
        try:
            mark(folder)
            with acquired(folder / _LOCK, timeout=0):
                folder = folder.rename(folder.with_name(folder.name[1:]))  # locked before another start can see it
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:  # the first signal raises and may interrupt the removal; a second one does not raise
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove a folder of :func:`private_folder` that no process has locked: its process was killed."""
    if is_marked(folder):
        with suppress(OSError, HeldError), acquired(folder / _LOCK, timeout=0):
            shutil.rmtree(folder)
