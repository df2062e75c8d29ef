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

from cifar_exp.system import host


@dataclass(frozen=True)
class Owner:
    """A process of a host. What cannot be known on a system is empty.

    Attributes:
        host: its name, and a few digits made from its machine id, since names are often given twice.
        boot_id: another one after each start of the host.
        pid_namespace: containers on one host count their processes separately.
        pid: the process.
        pid_started: when it started, on Linux in the kernel's ticks since the boot: pids are used again, and clocks are
            moved.
    """

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    pid_started: str

    @classmethod
    def here(cls) -> "Owner":
        """The process that asks."""
        return cls(_host(), host.boot_id(), host.pid_namespace(), os.getpid(), host.process_started(os.getpid()))

    def is_gone(self) -> bool:
        """Whether the process has certainly ended; False where that cannot be told from here."""
        if self.host != _host() or not self.boot_id or not host.boot_id():
            return False
        if self.boot_id != host.boot_id():
            return True
        if self.pid_namespace != host.pid_namespace() or not self.pid_started:
            return False
        return host.process_started(self.pid) != self.pid_started

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
def held(path: Path, timeout: float) -> Iterator[None]:
    """:func:`hold` for as long as the block lasts."""
    lock = hold(path, timeout)
    try:
        yield
    finally:
        lock.release()


def hold(path: Path, timeout: float = 0) -> FileLock:
    """Lock ``path`` until the returned lock is released or this process ends, however it does; note who holds it there.

    Args:
        path: the lock's file, which stays.
        timeout: seconds to wait for another holder.

    Raises:
        HeldError: where another process holds it for longer.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
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
    return f"{socket.gethostname()}-{hashlib.sha256(host.machine_id().encode()).hexdigest()[:6]}"
