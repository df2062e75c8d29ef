"""Requests to end training before its last step, and the point at which all ranks stop.

All ranks must stop at the same point, or some would wait for the others forever. So rank 0 looks for a request before a
collective. If there is one, it writes the coming stop point to a file. After the collective every rank reads that file.
"""

import signal
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from cifar_exp.system.atomic_files import write_atomically

STOP_FILE = "stop"  # in the run folder: a file made by a user who wants training to end here
INTERRUPT_FILE = "interrupt"  # in ipc_dir: made by the launcher after a signal, with the signal's number
AGREED_FILE = "agreed"  # in ipc_dir: the stop point, made by rank 0
KNOWN_TO_ALL_HOSTS_FILE = "agreed-everywhere"  # in ipc_dir: made by the launcher when each host has the stop point


class StopPoint(NamedTuple):
    """A point at which all ranks may stop together. Points compare in the order in which training reaches them.

    Attributes:
        step: steps trained.
        in_evaluation: False right after that step, True during the evaluation that follows.
    """

    step: int
    in_evaluation: bool = False


class Request(NamedTuple):
    """Why training ends before its last step.

    Attributes:
        kind: ``interrupt``: save and exit, to be resumed; ``stop``: end training here.
        reason: in words.
    """

    kind: Literal["interrupt", "stop"]
    reason: str


def agree(ipc_dir: Path, point: StopPoint, request: Request) -> None:
    """Make all ranks stop at ``point``, unless a stop point was already chosen."""
    agreed = ipc_dir / AGREED_FILE
    if not agreed.exists():
        text = f"{point.step:d} {point.in_evaluation:d} {request.kind} {request.reason}"
        write_atomically(agreed, text, durable=False)


def interrupted_by(ipc_dir: Path) -> int:
    """The number of the signal after which the launcher asked the ranks to save and exit."""
    with suppress(OSError, ValueError):
        return int((ipc_dir / INTERRUPT_FILE).read_text())
    return signal.SIGTERM  # the launcher is just writing the file


def ended_by(ipc_dir: Path) -> Request | None:
    """The request that ended training before its last step; None if there was none."""
    found = agreement(ipc_dir)
    return found[1] if found else None


def agreement(ipc_dir: Path) -> tuple[StopPoint, Request] | None:
    """Where and why all ranks stop; None if they do not."""
    try:
        step, in_evaluation, kind, reason = (ipc_dir / AGREED_FILE).read_text().split(" ", 3)
    except FileNotFoundError:
        return None
    request = Request("interrupt" if kind == "interrupt" else "stop", reason)
    return StopPoint(int(step), in_evaluation == "1"), request
