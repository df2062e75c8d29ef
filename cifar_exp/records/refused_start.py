"""Remove everything that was written for a run or sweep that was refused."""

import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cifar_exp.errors import ConfigError, DataError, MachineError
from cifar_exp.records.run_folder import LOCK_FILE

REFUSING_ERRORS = (ConfigError, DataError, MachineError)  # nothing was started
HYDRA_FILES = ("config.yaml", "hydra.yaml", "overrides.yaml")  # in hydra.output_subdir


@dataclass(frozen=True)
class Before:
    """The state of the disk before the folder of a run or sweep was created.

    Attributes:
        folder: that folder.
        missing: the folder and its parents that did not exist, innermost first.
        names: names of the files and folders in it.
    """

    folder: Path
    missing: Sequence[Path]
    names: frozenset[str]

    @classmethod
    def of(cls, folder: Path) -> "Before":
        """The present state."""
        folder = folder.absolute()
        names = frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset()
        return cls(folder, [place for place in (folder, *folder.parents) if not place.exists()], names)

    def restore(self, files: Iterable[str] = (), subfolder: str | None = None) -> None:
        """Remove only files that this start has written. Its open log files are closed first.

        Args:
            files: names of the files that were written for the refused run, besides its log and its lock.
            subfolder: the folder in it with Hydra's YAML files, if there is one.
        """
        root = logging.getLogger()
        logs = [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]
        for handler in logs:
            if Path(handler.baseFilename).parent == self.folder:
                root.removeHandler(handler)
                handler.close()
        written = {*files, LOCK_FILE, *(Path(handler.baseFilename).name for handler in logs)} - self.names
        with suppress(OSError):
            for name in written:
                (self.folder / name).unlink(missing_ok=True)
            if subfolder and subfolder not in self.names and (inner := self.folder / subfolder).is_dir():
                for name in HYDRA_FILES:
                    (inner / name).unlink(missing_ok=True)
                inner.rmdir()
        with suppress(OSError):  # a callback's files are in it, or another process's
            for folder in self.missing:
                folder.rmdir()
