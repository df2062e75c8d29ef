"""Signals that end a run in order. Imported before anything else is, so that they are answered from the start."""

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType

from cifar_exp.errors import Stopped

Handler = Callable[[int, FrameType | None], None]


def answer_signals() -> None:
    """The first signal is raised as ``Stopped``, the second is answered, the third ends the process at once."""
    sys.unraisablehook = _but_signals
    _answer(_stop)


def swallowed() -> Stopped | None:
    """The signal that was raised. Libraries may have made nothing of it, or an error of theirs."""
    answer = signal.getsignal(signal.SIGTERM)
    return answer.args[0] if isinstance(answer, partial) else None


def raise_swallowed() -> None:
    """Raise it again."""
    if stopped := swallowed():
        raise stopped


def ignore_signals() -> None:
    """Everything is closed: the exit code stands."""
    _answer(signal.SIG_IGN)


def signals_to_answer() -> list[signal.Signals]:
    """Ctrl-C, SIGTERM and the end of the terminal; not the latter under ``nohup``, or once it has been answered."""
    answered = [signal.SIGINT, signal.SIGTERM]
    return answered if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [*answered, signal.SIGHUP]


def answer_once(number: int) -> None:
    """A terminal that is closed sends its signal twice, by the system and by the shell: that is no second wish."""
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_IGN)


def _answer(handler: Handler | signal.Handlers) -> None:
    for number in signals_to_answer():
        signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    stopped = Stopped(number)
    _answer(partial(_closing, stopped))
    answer_once(number)
    raise stopped


def _closing(first: Stopped, number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    _answer(partial(_end_now, first))
    answer_once(number)
    print("cifar-exp: the run is being closed; once more ends it at once", file=sys.stderr, flush=True)


def _but_signals(unraisable: "sys.UnraisableHookArgs") -> None:
    """Show what was raised where nothing can be, as in ``__del__``; a signal is raised again, and told, elsewhere."""
    if not isinstance(unraisable.exc_value, Stopped):
        sys.__unraisablehook__(unraisable)


def _end_now(first: Stopped, number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    os._exit(128 + number)
