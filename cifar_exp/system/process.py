"""What this process arranges with the system before anything starts."""

import atexit
import logging
import os
import resource
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

from cifar_exp.errors import MachineError
from cifar_exp.system.host import c_function
from cifar_exp.system.surroundings import print_anywhere

OPEN_FILES = 256  # several times what a parent with MLflow has open
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def allow_open_files() -> None:
    """See to it that this process and its ranks may open as many files as they need.

    Raises:
        MachineError: where the limit is too low and must not be raised.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:  # -1 is no limit
        if 0 <= hard < OPEN_FILES:
            raise MachineError(
                f"ulimit -n: a process may have {hard} open files here, and a run takes up to {OPEN_FILES}. Type "
                f"ulimit -n {OPEN_FILES} first, where you may, or ask who administrates the machine"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))


def keep_freed_memory() -> None:
    """Keep what is freed for what is allocated next, where the C library is glibc.

    glibc gives large blocks back to the system and asks for them again, which has to find and clear every page. A step
    frees and allocates all activations, and a block over 32 MiB, as those of 256 images in float32 are, is never kept.
    """
    if mallopt := c_function("mallopt"):  # musl and macOS have none
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def end_process(code: int) -> NoReturn:
    """End with this exit code, whatever other threads are at.

    One that was left alone may be in C++ code, which aborts the process where Python ends the thread with itself. Then
    there is no other way than to do what Python does at its end and leave without it.
    """
    if not any(thread.daemon for thread in threading.enumerate()):
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def uv_prefix() -> str:
    """What to type before a command of the environment: uv sets this variable for what it runs."""
    return "uv run " if "UV" in os.environ else ""


def outlive_terminal() -> None:
    """From now on what cannot be printed is dropped: a run must not end because nobody reads it any more.

    That is the case behind ``| head``, on a terminal that was closed and on a full disk, where the log ends, too.
    """
    print_anywhere()
    logging.raiseExceptions = False  # else it would print a traceback for each line
    for stream in (sys.stdout, sys.stderr):
        stream.write = _or_nowhere(stream, stream.write)  # type: ignore[method-assign]
        stream.flush = _or_nowhere(stream, stream.flush)  # type: ignore[method-assign]


def _or_nowhere(stream: TextIO, act: Callable[..., Any]) -> Callable[..., Any]:
    """``act`` of the stream, which goes nowhere from the first failure on."""

    def acting(*arguments: Any) -> Any:
        try:
            return act(*arguments)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            return act(*arguments)

    return acting
