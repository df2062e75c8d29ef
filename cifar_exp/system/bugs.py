"""Report unexpected errors as bugs: where the traceback was saved, and which versions to report.

Libraries have their own exception classes for errors that a user can fix. A built-in exception, such as ``TypeError``
or ``AttributeError``, is a bug in this program or in a library.
"""

import errno
import logging
import os
import platform
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeGuard

from cifar_exp.errors import CifarExpError, StorageError
from cifar_exp.system.redaction import masked_text

# Errors of the machine: the disk is full, access is denied, too many files are open, the device is broken.
MACHINE_ERRNOS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENOMEM),
}
REPORTED = ("cifar-exp", "hydra-core", "omegaconf", "torch", "torchvision", "mlflow", "numpy")
# Built-in exception classes for errors of the machine, the network or the content of a file.
_EXTERNAL_ERRORS = (OSError, MemoryError, UnicodeError)
LONGEST = 300  # characters of an error in a message; the traceback has the rest


def is_bug(error: BaseException) -> bool:
    """Whether the error is a bug: its class is built into Python and not about the machine, the network or a file."""
    if isinstance(error, ImportError):  # all required modules are installed with the package
        return True
    return type(error).__module__ == "builtins" and not isinstance(error, _EXTERNAL_ERRORS)


def origin(error: BaseException, *packages: str) -> str:
    """The innermost of ``packages`` in the traceback; empty if none of them is in it."""
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package in packages:
            found = package
    return found


def raised_in(error: BaseException) -> str:
    """The package whose code raised the error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def first_cause(error: BaseException) -> BaseException:
    """The first exception in the chain of causes and contexts of ``error``."""
    while earlier := error.__cause__ or error.__context__:
        error = earlier
    return error


class BugError(CifarExpError):
    """An unexpected error. The message says where the traceback was saved and what to report. Exit code 1."""

    def __init__(self, error: BaseException, context: str = "") -> None:
        """Save the traceback and build the message.

        Args:
            error: the unexpected error.
            context: text before the message, for example which operation failed.
        """
        super().__init__(f"{context}{bug_text(error)}")


def bug_text(error: BaseException) -> str:
    """Save the traceback and return the message about a bug, in three lines."""
    place = keep_traceback(error)
    kept = f"Its traceback is in {place}" if place else f"Its traceback, which could not be kept:\n{_text(error)}"
    return (
        f"this is a bug, not a mistake in what was typed: {described(error)}{_place(error)}\n{kept}\n"
        f"Please report it with that traceback and these versions: {versions()}"
    )


def _is_machine_error(error: BaseException) -> TypeGuard[OSError]:
    return isinstance(error, OSError) and error.errno in MACHINE_ERRNOS


def exit_code(error: BaseException) -> int:
    """The exit code of :func:`as_user_error`, without printing a message."""
    kept: int = getattr(error, "exit_code", BugError.exit_code)
    return StorageError.exit_code if _is_machine_error(error) else kept


def forget_frames(error: BaseException | None) -> None:
    """Drop the variables of the frames that ``error`` and its causes went through; the tracebacks stay readable."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def as_user_error(error: BaseException) -> CifarExpError:
    """Convert any exception to one for the user: errors of the machine to StorageError, unknown ones to BugError."""
    if isinstance(error, CifarExpError):
        return error
    if _is_machine_error(error):
        where = f"{error.filename}: " if error.filename else ""
        return StorageError(
            f"{where}{error.strerror}. Its traceback is in {keep_traceback(error)}. Fix the cause and start again"
        )
    return BugError(error)


def described(error: BaseException) -> str:
    """The error's type and message in one line of at most about ``LONGEST`` characters, with secrets masked."""
    text = masked_text(" ".join(str(error).split()))
    name = type(error).__name__
    return f"{name}: {text if len(text) <= LONGEST else text[:LONGEST] + ' ...'}" if text else name


def _place(error: BaseException) -> str:
    """File name and line that raised the error: it may be one of the user's own modules."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def versions() -> str:
    """The versions of the relevant packages, of Python and of the system, in one line."""
    found = []
    for name in REPORTED:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join([*found, f"Python {platform.python_version()}", platform.platform()])


def keep_traceback(error: BaseException) -> Path | None:
    """Append the traceback to the run's log. Without a log, write it to a new temporary file.

    Returns:
        The file; None if neither could be written.
    """
    text = f"{versions()}\n{_text(error)}"
    for log in _logs():
        with suppress(OSError), log.open("a", encoding="utf-8") as file:
            file.write(text)
            return log
    with (
        suppress(OSError),
        tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="cifar-exp-bug-", suffix=".txt", delete=False
        ) as file,
    ):
        file.write(text)
        return Path(file.name)
    return None


def _text(error: BaseException) -> str:
    return masked_text("".join(traceback.format_exception(error)))


def _logs() -> Iterator[Path]:
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler) and handler.baseFilename != os.devnull:
            yield Path(handler.baseFilename)
