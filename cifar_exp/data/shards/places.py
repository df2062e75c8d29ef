"""Where shards are stored: a folder, or a bucket of an S3-compatible server. Both are small and picklable."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

from cifar_exp.data.presence import SplitName
from cifar_exp.errors import DataError
from cifar_exp.system.printable import printable


class StoredFile(NamedTuple):
    """A file with shards.

    Attributes:
        name: below the root, with ``/``.
        size: in bytes.
        version: changes with its content: time of change in ns, or the ETag of S3.
    """

    name: str
    size: int
    version: str


class Place(Protocol):
    """A folder or bucket. Every method raises a DataError if it cannot be read."""

    @property
    def address(self) -> str:
        """``data.root`` for messages."""
        ...

    def files(self, split: SplitName) -> list[StoredFile]:
        """All files below the folder of a split, sorted by name."""
        ...

    def find(self, name: str) -> StoredFile | None:
        """The file with that name below the root, if there is one."""
        ...

    def content(self, file: StoredFile) -> bytes:
        """A small file."""
        ...

    def part(self, file: StoredFile, offset: int, size: int) -> bytes:
        """A part of a file: fewer bytes if it ends before."""
        ...

    def local(self, file: StoredFile) -> Path | None:
        """Where the file is on this machine; None if it must be downloaded."""
        ...

    def download(self, file: StoredFile) -> Iterable[bytes]:
        """The whole file in chunks."""
        ...


class _OpenFile:
    """A descriptor that is closed with the last reference, so never while a thread reads from it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self.descriptor)


@lru_cache(maxsize=64)
def _open(path: Path, _version: str) -> _OpenFile:
    return _OpenFile(path)


def read_part(path: Path, version: str, offset: int, size: int) -> bytes:
    """A part of a file on this machine. The last 64 files stay open: on network file systems opening is slow.

    Raises:
        OSError: it cannot be read.
    """
    opened = _open(path, version)
    return os.pread(opened.descriptor, size, offset)


def _stored(root: Path, path: Path) -> StoredFile:
    about = path.stat()
    return StoredFile(path.relative_to(root).as_posix(), about.st_size, str(about.st_mtime_ns))


@dataclass(frozen=True)
class Folder:
    """A folder on this machine. Links are followed: caches of downloads consist of them."""

    root: Path

    @property
    def address(self) -> str:
        return printable(self.root)

    def files(self, split: SplitName) -> list[StoredFile]:
        found: list[StoredFile] = []

        def failed(error: OSError) -> None:
            raise DataError(f"data.root={self.address}: {printable(error.filename)} cannot be read: {error.strerror}")

        for folder, folders, names in os.walk(self.root / split, onerror=failed):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in names:
                path = Path(folder, name)
                if path.is_file() and not name.startswith("."):
                    found.append(_stored(self.root, path))
        return sorted(found)

    def find(self, name: str) -> StoredFile | None:
        path = self.root / name
        return _stored(self.root, path) if path.is_file() else None

    def content(self, file: StoredFile) -> bytes:
        return self.part(file, 0, file.size)

    def part(self, file: StoredFile, offset: int, size: int) -> bytes:
        try:
            return read_part(self.root / file.name, file.version, offset, size)
        except OSError as error:
            raise DataError(
                f"data.root={self.address}: {printable(file.name)} cannot be read: {error.strerror}"
            ) from error

    def local(self, file: StoredFile) -> Path | None:
        return self.root / file.name

    def download(self, file: StoredFile) -> Iterable[bytes]:  # noqa: ARG002
        raise AssertionError("a file of a folder is there")
