"""The errors that a user can see, each with the exit code that scripts rely on.

An error of these classes is shown as its message alone. Any other error is a bug, and its traceback is kept.
"""

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar


class CifarExpError(Exception):
    """A failure whose message names the setting, its value, the rule and the remedy."""

    exit_code: ClassVar[int] = 1


class ConfigError(CifarExpError):
    """A setting is wrong. No training step was done."""

    exit_code = 2


class DataError(CifarExpError):
    """The images are missing, broken or inconsistent."""

    exit_code = 3


class MachineError(CifarExpError):
    """The machine lacks what was asked for."""

    exit_code = 4


class TrackingError(CifarExpError):
    """Training finished and nothing is lost, but the tracking store could not be written."""

    exit_code = 5


class DivergenceError(CifarExpError):
    """The loss is not finite."""

    exit_code = 6


class WorkerError(CifarExpError):
    """A worker process raised or died."""

    exit_code = 7


class StorageError(CifarExpError):
    """A file of the run could not be written or read back."""

    exit_code = 8


class Stopped(KeyboardInterrupt):
    """A signal stopped the run. It is not an ``Exception``, so that it ends the whole sweep and not only one job."""

    def __init__(self, signal_number: int, received: float | None = None) -> None:
        """``received``: when the signal came, on the monotonic clock; None: now."""
        super().__init__(f"stopped by signal {signal_number}")
        self.number, self.exit_code = signal_number, 128 + signal_number
        self.received = time.monotonic() if received is None else received

    @classmethod
    def cause_of(cls, error: BaseException | None) -> "Stopped | None":
        """The signal that caused ``error``. Python 3.11 wraps an exception that is raised while a class is created."""
        while error is not None and not isinstance(error, cls):
            error = error.__cause__
        return error


class HostStoppedError(CifarExpError):
    """A signal stopped another host of the run, and with it all of them. ``exit_code`` is 128 plus its number."""


def error_of_code(code: int, message: str) -> CifarExpError:
    """An error with this exit code, which another process has reported."""
    kinds = (ConfigError, DataError, MachineError, TrackingError, DivergenceError, WorkerError, StorageError)
    for kind in kinds:
        if kind.exit_code == code:
            return kind(message)
    error = HostStoppedError(message) if code > 128 else CifarExpError(message)
    error.exit_code = code  # type: ignore[misc]
    return error


FREE_SPACE = "Free space there and start again"
ALLOW_WRITING = "Allow writing there and start again"


@contextmanager
def storage_errors(path: Path, advice: str) -> Iterator[None]:
    """Raise a ``StorageError`` that ends with ``advice`` for an ``OSError`` in the block, which writes to ``path``."""
    try:
        yield
    except OSError as error:
        if advice == FREE_SPACE and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = ALLOW_WRITING
        raise StorageError(f"{path} cannot be written: {error.strerror or error}. {advice}") from error
