"""Signal handlers that end a run gracefully. Imported first, so that they are active from the start."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import NoReturn

from cifar_exp.errors import Stopped

Handler = Callable[[int, FrameType | None], None]
# The stop signals: Ctrl-C, `timeout`, a closed terminal, preemption by a scheduler. A terminal, a scheduler and a
# container send them to every process of the run. Only the parent handles them: it asks the ranks to finish their step
# and save. All other processes are started with these signals blocked, and ignore them.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
REPEAT_SECONDS = 1.0  # `timeout` sends its signal to the command and at once again to the command's group


def install_signal_handlers() -> None:
    """Install the handlers: the first signal raises ``Stopped``, the second prints a note, the third exits at once."""
    sys.unraisablehook = _print_except_signals
    _answer(_stop)


def swallowed() -> Stopped | None:
    """The signal that was raised, if any. A library may have swallowed the exception or replaced it."""
    answer = signal.getsignal(signal.SIGTERM)
    return answer.args[0] if isinstance(answer, partial) else None


def raise_swallowed() -> None:
    """Raise the signal again if a library swallowed it."""
    if stopped := swallowed():
        raise stopped


def raise_stopped(number: int) -> NoReturn:
    """Answer the first signal: raise ``Stopped``, and treat the next signal as the second one."""
    stopped = Stopped(number)
    note_stopped(stopped)
    raise stopped


def note_stopped(stopped: Stopped) -> None:
    """Treat the next signal as the second one."""
    _answer(partial(_closing, stopped))
    answer_once(stopped.number)


def ignore_signals() -> None:
    """Ignore signals from now on: everything is closed, and the exit code is final."""
    _answer(signal.SIG_IGN)


def signals_to_answer() -> list[signal.Signals]:
    """The signals of ``STOPPING``, without those that are ignored, such as SIGHUP under ``nohup``."""
    always = (signal.SIGINT, signal.SIGTERM)
    left_alone = (signal.SIG_IGN, None)  # None: a handler that is not Python's
    return [number for number in STOPPING if number in always or signal.getsignal(number) not in left_alone]


def leave_signals_to_parent() -> None:
    """Ignore the stop signals in a child process: the parent ends it."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Block the stop signals inside this context. Processes that are started in it inherit the blocked signals."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_repeated(first: Stopped, number: int) -> bool:
    """Whether the first signal was sent a second time by the same sender."""
    return first.number == number and time.monotonic() - first.received < REPEAT_SECONDS


def other_handler(handler: object) -> Handler | None:
    """``handler``, unless it is Python's default or one of this module's."""
    own = (_stop, signal.default_int_handler)
    return handler if callable(handler) and handler not in own and not isinstance(handler, partial) else None


def answer_once(number: int) -> None:
    """Ignore a second SIGHUP: a closed terminal sends it twice, by the system and, maybe later, by the shell."""
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_IGN)


def _answer(handler: Handler | signal.Handlers) -> None:
    for number in signals_to_answer():
        signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise_stopped(number)


def _closing(first: Stopped, number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    if is_repeated(first, number):
        return
    _answer(partial(_end_now, first))
    answer_once(number)
    print("cifar-exp: the run is being closed; a third signal ends it at once", file=sys.stderr, flush=True)


def _print_except_signals(unraisable: "sys.UnraisableHookArgs") -> None:
    """Print exceptions that Python cannot propagate, as from ``__del__``.

    ``Stopped`` is not printed: it is raised again elsewhere.
    """
    if not isinstance(unraisable.exc_value, Stopped):
        sys.__unraisablehook__(unraisable)


def _end_now(first: Stopped, number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    os._exit(128 + number)
