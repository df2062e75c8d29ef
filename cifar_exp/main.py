"""Command line -> composed config -> plan -> launch: one run, or one job of a sweep."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from cifar_exp.errors import Stopped
from cifar_exp.signals import answer_once, signals_to_answer

if TYPE_CHECKING:  # everything heavy is imported where it is first needed: --help and a wrong setting answer at once
    from omegaconf import DictConfig


def main() -> None:
    """The command `cifar-exp`."""
    _answer_signals(_stop)
    try:
        from cifar_exp.commandline import run_hydra

        code = run_hydra(run_job)
        _answer_signals(signal.SIG_IGN)  # everything is closed: the exit code stands
        sys.exit(code)
    except (Stopped, Exception) as error:
        if (stopped := Stopped.behind(error)) is None:
            raise
        print(f"cifar-exp: {stopped}", file=sys.stderr)
        sys.exit(stopped.exit_code)


def run_job(composed: "DictConfig") -> float:
    """Train once as ``composed`` says; what Hydra calls for a run and for each job of a sweep. The test accuracy."""
    from cifar_exp.config import build, read_config
    from cifar_exp.nursery import warm_up

    config = read_config(composed)
    warm_up()
    parts = build(config)

    from cifar_exp.run import run

    return run(config, parts)


def _stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """The first signal ends the run in order; the second is answered, the third ends the process at once."""
    _answer_signals(_closing)
    answer_once(number)
    raise Stopped(number)


def _closing(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    _answer_signals(_end_now)
    answer_once(number)
    print("cifar-exp: the run is being closed; once more ends it at once", file=sys.stderr, flush=True)


def _end_now(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    os._exit(128 + number)


def _answer_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in signals_to_answer():
        signal.signal(number, handler)
