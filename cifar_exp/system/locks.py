"""Which process holds something, told so that any later process can find out whether it still lives."""

import functools
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from cifar_exp.errors import storage_errors

PROC = Path("/proc")


@dataclass(frozen=True)
class Owner:
    """A process of a host. What cannot be known on a system is empty.

    Attributes:
        host: its name, and a few digits made from its machine id, since names are often given twice.
        boot_id: another one after each start of the host.
        pid_namespace: containers on one host count their processes separately.
        pid: the process.
        pid_started: when it started, in the kernel's ticks since the boot: pids are used again, and clocks are moved.
    """

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    pid_started: str

    @classmethod
    def here(cls) -> "Owner":
        """The process that asks."""
        return cls(_host(), _boot_id(), _pid_namespace(), os.getpid(), _started(os.getpid()))

    def is_gone(self) -> bool:
        """Whether the process has certainly ended; False where that cannot be told from here."""
        if self.host != _host() or not self.boot_id or not _boot_id():
            return False
        if self.boot_id != _boot_id():
            return True
        if self.pid_namespace != _pid_namespace() or not self.pid_started:
            return False
        return _started(self.pid) != self.pid_started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.rpartition('-')[0]}"


class HeldError(Exception):
    """Another process holds a lock.

    Attributes:
        holder: which, as in ``process 123 on host``.
    """

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is held by {holder}")
        self.holder = holder


@contextmanager
def held(path: Path, timeout: float | None) -> Iterator[None]:
    """:func:`hold` for as long as the block lasts."""
    lock = hold(path, timeout)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def locked(path: Path, advice: str) -> Iterator[None]:
    """Wait for the lock file ``path`` and hold it for the block; its folder is created where it is missing.

    Raises:
        StorageError: the folder cannot be written; the message ends with ``advice``.
    """
    with storage_errors(path.parent, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = hold(path, timeout=None)
    with lock:
        yield


def hold(path: Path, timeout: float | None = 0) -> FileLock:
    """Lock ``path`` until the returned lock is released or this process ends, however it does; note who holds it there.

    Args:
        path: the lock's file, which stays.
        timeout: seconds to wait for another holder; None waits as long as it takes.

    Raises:
        HeldError: where another process holds it for longer.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if timeout is None else timeout)
    except Timeout:
        raise HeldError(path, str(_noted(path) or "another process")) from None
    with suppress(OSError):  # the lock holds without its note
        path.write_text(json.dumps(asdict(Owner.here())) + "\n")
    return lock


def _noted(path: Path) -> Owner | None:
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


@functools.cache
def _host() -> str:
    machine = _content(Path("/etc/machine-id"))
    return f"{socket.gethostname()}-{hashlib.sha256(machine.encode()).hexdigest()[:6]}"


def _boot_id() -> str:
    return _content(PROC / "sys/kernel/random/boot_id")


def _pid_namespace() -> str:
    try:
        return str((PROC / "self/ns/pid").readlink())
    except OSError:
        return ""


def _started(pid: int) -> str:
    """The 22nd field of ``/proc/<pid>/stat``; the second, the command in parentheses, may hold anything."""
    fields = _content(PROC / str(pid) / "stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""


def _content(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
