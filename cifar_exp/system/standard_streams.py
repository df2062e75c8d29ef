"""Handle unusual standard streams: closed, a pipe without a reader, a full disk, another encoding."""

import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

NAMES = ("stdin", "stdout", "stderr")  # in the order of their descriptors


def open_closed_streams() -> None:
    """Open the null device in place of standard streams that were closed at the start, as by ``>&-``.

    Python has None for such a stream. The next file that is opened would get its descriptor, and the output of this
    process and its children would go into that file.
    """
    for number in range(len(NAMES)):  # all of them first: a file opened in between would get a free descriptor
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
    for number, name in enumerate(NAMES):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("r" if number == 0 else "w"))  # noqa: SIM115


def print_anywhere() -> None:
    """Print ``?`` for characters that the encoding of stdout or stderr cannot represent."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def ignore_broken_output() -> None:
    """Drop output that cannot be written, so that a run does not fail because of it.

    Causes: ``| head``, a closed terminal, a full disk.
    """
    print_anywhere()
    logging.raiseExceptions = False  # else it would print a traceback for each line
    for stream in (sys.stdout, sys.stderr):
        ignore_broken(stream)


def ignore_broken(stream: TextIO) -> None:
    """Drop output that cannot be written to ``stream``."""
    stream.write = _with_null_device(stream, stream.write)  # type: ignore[method-assign]
    stream.flush = _with_null_device(stream, stream.flush)  # type: ignore[method-assign]


def flush_output() -> None:
    """Flush the buffers; drop output that cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # broken, closed, none
            stream.flush()


def _with_null_device(stream: TextIO, act: Callable[..., Any]) -> Callable[..., Any]:
    """``act``, which redirects the stream to the null device at its first failure."""

    def acting(*arguments: Any) -> Any:
        try:
            return act(*arguments)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            return act(*arguments)

    return acting
