"""Lock files, with a description of the holder, so that other processes can find out whether it still runs."""

import errno
import fcntl
import functools
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from cifar_exp.errors import storage_errors
from cifar_exp.system import foreign_files, host
from cifar_exp.system.atomic_files import CANNOT

NO_LOCKS = {*CANNOT, errno.ENOLCK}
MARKER = ".held"


@dataclass(frozen=True)
class Owner:
    """A process on a host. Fields that the system does not provide are empty.

    Attributes:
        host: host name and a few digits of a hash of its machine id, since names are often not unique.
        boot_id: changes with each boot of the host.
        pid_namespace: containers on one host number their processes separately.
        pid: process id.
        pid_started: start of the process, on Linux in kernel ticks since boot: pids are reused, and clocks are changed.
    """

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    pid_started: str

    @classmethod
    def here(cls) -> "Owner":
        """The calling process."""
        return cls(_host(), host.boot_id(), host.pid_namespace(), os.getpid(), host.process_started(os.getpid()))

    @property
    def shares_kernel(self) -> bool:
        """Whether the process is or was under the kernel that runs here, perhaps in another container."""
        return bool(self.boot_id) and self.boot_id == host.boot_id()

    @property
    def host_name(self) -> str:
        """The name of its host or container."""
        return self.host.rpartition("-")[0]

    def is_gone(self) -> bool:
        """Whether the process has certainly ended; False if that is unknown."""
        if self.host != _host() or not self.boot_id or not host.boot_id():
            return False
        if self.boot_id != host.boot_id():
            return True
        if self.pid_namespace != host.pid_namespace() or not self.pid_started:
            return False
        return host.process_started(self.pid) != self.pid_started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host_name}"


class HeldError(Exception):
    """Another process holds a lock.

    Attributes:
        holder: that process, for example ``process 123 on host``.
        marker: the file to remove if that process is gone; None if the kernel frees the lock.
    """

    def __init__(self, path: Path, holder: str, marker: Path | None) -> None:
        super().__init__(f"{path} is held by {holder}")
        self.holder, self.marker = holder, marker


class Held:
    """A lock that is held until it is released, the block ends, or this process does."""

    def __init__(self, lock: BaseFileLock) -> None:
        self._lock = lock

    def release(self) -> None:
        """Free the lock."""
        self._lock.release(force=True)

    def __enter__(self) -> Self:  # filelock's own would take the lock a second time
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextmanager
def acquired(path: Path, timeout: float | None) -> Iterator[None]:
    """Hold the lock ``path`` inside the block. Wait up to ``timeout`` seconds for it; None: without a limit."""
    with acquire(path, timeout):
        yield


@contextmanager
def locked(path: Path, advice: str) -> Iterator[None]:
    """Create the folder of ``path``, wait for the lock ``path``, and hold it inside the block.

    Raises:
        StorageError: the folder cannot be written; the message ends with ``advice``.
    """
    with storage_errors(path.parent, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = acquire(path, timeout=None)
    with lock:
        yield


def acquire(path: Path, timeout: float | None = 0) -> Held:
    """Lock ``path`` until the returned lock is released or this process ends, and write the holder into the file.

    If the file system has no locks, like some network file systems, a file beside ``path`` marks it as locked. It is
    ignored once its process on this host has ended.

    Args:
        path: the lock file, which is not deleted.
        timeout: seconds to wait for another holder; None waits as long as it takes.

    Raises:
        HeldError: another process still holds it after ``timeout``.
        OSError: the file cannot be written.
    """
    patience, marker = -1 if timeout is None else timeout, None
    lock: BaseFileLock = FileLock(path, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=patience)
        except OSError as error:
            if isinstance(error, Timeout) or error.errno not in NO_LOCKS:
                raise
            marker = path.with_name(f"{path.name}{MARKER}")
            lock = SoftFileLock(marker)
            lock.acquire(timeout=patience)
    except Timeout:
        raise HeldError(path, str(_noted(path) or "another process"), marker) from None
    with suppress(OSError, ValueError):  # the lock holds without the holder's name
        if not path.read_text() or _noted(path):  # else it is a file of the user's with this name
            path.write_text(json.dumps(asdict(Owner.here())) + "\n")
    return Held(lock)


def is_free(path: Path) -> bool:
    """Whether the lock file ``path`` is there and no process that this kernel knows of holds it."""
    try:
        with path.open("rb") as file:  # not by FileLock, which empties the file
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held; or there is no such file; or the file system has no locks
        return False
    return True


def _noted(path: Path) -> Owner | None:
    try:
        owner = Owner(**foreign_files.read_json(path))
        return owner if type(owner.pid) is int and type(owner.host) is str else None
    except (OSError, ValueError, TypeError):
        return None


@functools.cache
def _host() -> str:
    return f"{socket.gethostname()}-{hashlib.sha256(host.machine_id().encode()).hexdigest()[:6]}"
