"""Requests to end training before its last step, and the point at which all ranks stop.

All ranks must stop at the same point, or some would wait for the others forever. So rank 0 looks for a request before a
collective. If there is one, it writes the coming stop point to a file. After the collective every rank reads that file.
"""

from pathlib import Path
from typing import Literal, NamedTuple

from cifar_exp.system.atomic_files import write_atomically

STOP_FILE = "stop"  # in the run folder: a file made by a user who wants training to end here
LEAVE_FILE = "leave"  # in the exchange folder: made by the launcher after a signal
_AGREED_FILE = "agreed"


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
        kind: ``leave``: save at once and exit, to be resumed later; ``finish``: training ends here for good.
        reason: in words.
    """

    kind: Literal["leave", "finish"]
    reason: str


def agree(exchange: Path, point: StopPoint, request: Request) -> None:
    """Let all ranks stop at ``point``, unless they already stop somewhere."""
    agreed = exchange / _AGREED_FILE
    if not agreed.exists():
        text = f"{point.step:d} {point.in_evaluation:d} {request.kind} {request.reason}"
        write_atomically(agreed, text, durable=False)


def ended_by(exchange: Path) -> Request | None:
    """The request that ended training before its last step; None where there was none."""
    found = agreement(exchange)
    return found[1] if found else None


def agreement(exchange: Path) -> tuple[StopPoint, Request] | None:
    """Where and why all ranks stop; None where they do not."""
    try:
        step, in_evaluation, kind, reason = (exchange / _AGREED_FILE).read_text().split(" ", 3)
    except FileNotFoundError:
        return None
    request = Request("leave" if kind == "leave" else "finish", reason)
    return StopPoint(int(step), in_evaluation == "1"), request
