"""What is nobody's fault but the program's: told as that, with the place of its traceback and what to report.

Libraries have classes of their own for what their users can mend. What Python itself raises, as ``TypeError`` or
``AttributeError``, was meant for nobody: the program, or a library, has made a mistake.
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

from cifar_exp.errors import CifarExpError, StorageError
from cifar_exp.system.redaction import masked_text

# What the system refuses: the disk is full, the folder is not ours, too many files are open, the device is broken.
REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENOMEM),
}
REPORTED = ("cifar-exp", "hydra-core", "omegaconf", "torch", "torchvision", "mlflow", "numpy")
# Python's own classes that tell of the machine, the network or the content of a file.
_OF_THE_WORLD = (OSError, MemoryError, UnicodeError)
LONGEST = 300  # characters of an error in a message; the rest is with its traceback


def is_bug(error: BaseException) -> bool:
    """Whether an error says that the program is wrong, not the world: Python's own, and not about the world."""
    if isinstance(error, ImportError):  # a module that is missing here was to be installed with the package
        return True
    return type(error).__module__ == "builtins" and not isinstance(error, _OF_THE_WORLD)


def origin(error: BaseException, *packages: str) -> str:
    """Which of ``packages`` was the last to act before ``error`` was raised; empty where none of them has."""
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package in packages:
            found = package
    return found


def raised_in(error: BaseException) -> str:
    """The package whose code has raised it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def first_cause(error: BaseException) -> BaseException:
    """What was raised first of all that has led to ``error``."""
    while earlier := error.__cause__ or error.__context__:
        error = earlier
    return error


class BugError(CifarExpError):
    """An unexpected error, its traceback kept; the message says where, and what to report. Exit code 1."""

    def __init__(self, error: BaseException, context: str = "") -> None:
        """``context``: what it has kept from being done, before the message."""
        super().__init__(f"{context}{bug_text(error)}")


def bug_text(error: BaseException) -> str:
    """What to tell of a bug, in three lines; its traceback is kept."""
    place = keep_traceback(error)
    kept = f"Its traceback is in {place}" if place else f"Its traceback, which could not be kept:\n{_text(error)}"
    return (
        f"this is a bug, not a mistake in what was typed: {described(error)}{_place(error)}\n{kept}\n"
        f"Please report it with that traceback and these versions: {versions()}"
    )


def told(error: BaseException) -> CifarExpError:
    """The error as a user is told it: what the system has refused as that, anything unknown as a bug."""
    if isinstance(error, CifarExpError):
        return error
    if isinstance(error, OSError) and error.errno in REFUSALS:
        where = f"{error.filename}: " if error.filename else ""
        return StorageError(
            f"{where}{error.strerror}. Its traceback is in {keep_traceback(error)}. Mend that and start again"
        )
    return BugError(error)


def described(error: BaseException) -> str:
    """Set and message in a line."""
    text = masked_text(" ".join(str(error).split()))
    name = type(error).__name__
    return f"{name}: {text if len(text) <= LONGEST else text[:LONGEST] + ' ...'}" if text else name


def _place(error: BaseException) -> str:
    """The file that raised it: it may be one of the user's own modules."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def versions() -> str:
    """Of the packages that matter, of Python and of the system, in a line."""
    found = []
    for name in REPORTED:
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join([*found, f"Python {platform.python_version()}", platform.platform()])


def keep_traceback(error: BaseException) -> Path | None:
    """Write it to the run's log, where there is one, else into a new file for temporary files; the file, if any."""
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
