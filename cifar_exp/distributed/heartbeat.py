"""Messages between ranks and their launcher during training: heartbeats up, requests to stop down.

Both are files in ``exchange``, the launcher's private folder, which all ranks of a machine share. All ranks must stop
at the same point, or some would wait for the others forever. So rank 0 looks for a request before a point at which all
ranks wait for each other, and writes that point to a file. When the ranks arrive there, each of them can read it.
"""

import os
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from cifar_exp.system.atomic_files import write_atomically

STOP_FILE = "stop"  # in the run folder: a file made by a user who wants training to end here
LEAVE_FILE = "leave"  # in the exchange folder: made by the launcher after a signal
_AGREED_FILE = "agreed"
_BEAT = struct.Struct("5q")  # the fields of Beat


class StopPoint(NamedTuple):
    """A point at which all ranks may stop together. Points compare in the order in which training reaches them.

    Attributes:
        step: steps trained.
        in_evaluation: False right after that step, True during the evaluation that follows.
    """

    step: int
    in_evaluation: bool = False


_START = StopPoint(0)


class Beat(NamedTuple):
    """A rank's newest heartbeat.

    Attributes:
        process: process id of the rank.
        point: the stop point that the rank is on its way to.
        stage: waits for other ranks that the rank has reached on its way there.
        beats: heartbeats of the rank so far.
    """

    process: int
    point: StopPoint
    stage: int
    beats: int

    @property
    def progress(self) -> tuple[StopPoint, int]:
        """How far the rank is. Of several ranks that wait for each other, the hung one has the lowest progress."""
        return self.point, self.stage

    @property
    def steps_trained(self) -> int:
        """Steps that the rank has trained, as far as the stop point shows."""
        return self.point.step if self.point.in_evaluation else max(0, self.point.step - 1)


class Request(NamedTuple):
    """Why training ends before its last step.

    Attributes:
        kind: ``leave``: save at once and exit, to be resumed later; ``finish``: training ends here for good.
        reason: in words.
    """

    kind: Literal["leave", "finish"]
    reason: str


@dataclass
class Control:
    """One rank's side of the exchange.

    Attributes:
        exchange: the folder that ranks and launcher share; None for a single rank without a launcher.
        run_dir: the run folder.
        rank: this rank.
        every: steps between two stop points. 1 on CPUs, where DDP makes the ranks wait in each step. On GPUs, where the
            host runs ahead, the steps between two reads of the loss.
        seconds: training finishes after so many seconds from now; None: no limit.
    """

    exchange: Path | None = None
    run_dir: Path = Path()
    rank: int = 0
    every: int = 1
    seconds: float | None = None
    _point: StopPoint = _START
    _stage: int = 0
    _beats: int = 0
    _file: int | None = None
    _began: float = field(default_factory=time.monotonic)  # the wall clock may be set meanwhile

    def __post_init__(self) -> None:
        if self.exchange:
            self._file = os.open(self.exchange / f"beat-{self.rank}", os.O_WRONLY | os.O_CREAT, 0o600)
            self.beat()

    def beat(self) -> None:
        """Give a heartbeat, with the progress of this rank."""
        if self._file is not None:
            self._beats += 1
            os.pwrite(self._file, _BEAT.pack(os.getpid(), *self._point, self._stage, self._beats), 0)

    def next_stage(self) -> None:
        """Call before this rank may wait for others on its way to a stop point. All ranks have the same stages.

        When ranks wait for each other, the hung rank is the one at the lowest stage.
        """
        self._stage += 1
        self.beat()

    def approach(self, point: StopPoint) -> None:
        """Call before all ranks wait for each other at ``point``. Rank 0 looks for a request to stop there."""
        if point != self._point:
            self._point, self._stage = point, 0
        self.beat()
        if self.rank == 0 and self.exchange and (request := self._look_for_request()):
            agreed = self.exchange / _AGREED_FILE
            if not agreed.exists():
                text = f"{point.step:d} {point.in_evaluation:d} {request.kind} {request.reason}"
                write_atomically(agreed, text, durable=False)

    def agreed(self, point: StopPoint) -> Request | None:
        """Call after all ranks have waited for each other at ``point``. The same request on every rank, or None."""
        found = _read_agreement(self.exchange) if self.exchange else None
        return found[1] if found and point >= found[0] else None

    def done(self) -> None:
        """Note that this rank has done its work: from now on its process may end."""
        if self.exchange:
            (self.exchange / f"done-{os.getpid()}").touch()

    def is_leaving(self) -> bool:
        """Whether the launcher waits for the ranks to exit. Training steps still count, other work is wasted."""
        return self.exchange is not None and (self.exchange / LEAVE_FILE).exists()

    def _look_for_request(self) -> Request | None:
        if self.is_leaving():
            return Request("leave", "a signal")
        stop = self.run_dir / STOP_FILE
        if stop.is_file():  # a folder of that name cannot be removed by a rank, and is no request
            stop.unlink(missing_ok=True)  # remove the file, or it would stop the resumed run as well
            return Request("finish", f"the file {stop.name} in the run's folder")
        if self.seconds is not None and time.monotonic() - self._began >= self.seconds:
            return Request("finish", "train.max_seconds")
        return None


def read_beat(exchange: Path, rank: int) -> Beat | None:
    """The newest heartbeat of a rank; None before its first one."""
    try:
        process, step, in_evaluation, stage, beats = _BEAT.unpack((exchange / f"beat-{rank}").read_bytes())
    except (FileNotFoundError, struct.error):
        return None
    return Beat(process, StopPoint(step, bool(in_evaluation)), stage, beats)


def ended_by(exchange: Path) -> Request | None:
    """The request that ended training before its last step; None where there was none."""
    found = _read_agreement(exchange)
    return found[1] if found else None


def _read_agreement(exchange: Path) -> tuple[StopPoint, Request] | None:
    try:
        step, in_evaluation, kind, reason = (exchange / _AGREED_FILE).read_text().split(" ", 3)
    except FileNotFoundError:
        return None
    request = Request("leave" if kind == "leave" else "finish", reason)
    return StopPoint(int(step), in_evaluation == "1"), request
