"""Signal handlers that end a run in an orderly way. Imported first, so that they are active from the start."""

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType

from cifar_exp.errors import Stopped

Handler = Callable[[int, FrameType | None], None]


def install_signal_handlers() -> None:
    """Install the handlers: the first signal raises ``Stopped``, the second prints a note, the third exits at once."""
    sys.unraisablehook = _but_signals
    _answer(_stop)


def swallowed() -> Stopped | None:
    """The signal that was raised, if any. A library may have swallowed the exception or replaced it."""
    answer = signal.getsignal(signal.SIGTERM)
    return answer.args[0] if isinstance(answer, partial) else None


def raise_swallowed() -> None:
    """Raise the signal again if a library swallowed it."""
    if stopped := swallowed():
        raise stopped


def ignore_signals() -> None:
    """Ignore signals from now on: everything is closed, and the exit code is final."""
    _answer(signal.SIG_IGN)


def signals_to_answer() -> list[signal.Signals]:
    """SIGINT, SIGTERM and SIGHUP; without SIGHUP under ``nohup`` or after the first one."""
    answered = [signal.SIGINT, signal.SIGTERM]
    return answered if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [*answered, signal.SIGHUP]


def answer_once(number: int) -> None:
    """Ignore a second SIGHUP: a closed terminal sends it twice, by the system and by the shell."""
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
    print("cifar-exp: the run is being closed; a third signal ends it at once", file=sys.stderr, flush=True)


def _but_signals(unraisable: "sys.UnraisableHookArgs") -> None:
    """Print exceptions that Python cannot propagate, as from ``__del__``.

    ``Stopped`` is not printed: it is raised again elsewhere.
    """
    if not isinstance(unraisable.exc_value, Stopped):
        sys.__unraisablehook__(unraisable)


def _end_now(first: Stopped, number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    os._exit(128 + number)
