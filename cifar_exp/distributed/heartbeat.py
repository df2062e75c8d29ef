"""What ranks and their launcher tell each other while training: signs of life up, wishes to stop down.

Both are files in the launcher's private folder, ``exchange``, which all ranks of a machine share. A wish must hold for
all ranks at the same moment, or some would wait for the others forever. So the first rank looks for it before a moment
at which all ranks wait for each other, and writes down that moment; when it comes, every rank can read that.
"""

import os
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from cifar_exp.system.atomic_files import write_atomically

STOP_FILE = "stop"  # in the run's folder: made by a user who wants training to end here
LEAVE_FILE = "leave"  # in the exchange folder: made by the launcher, for a signal
_AGREED_FILE = "agreed"
_BEAT = struct.Struct("qqqq")  # process id, the moment that it is on its way to, the stage of that, signs of life


class Request(NamedTuple):
    """Why training ends before its last step.

    Attributes:
        kind: ``leave``: save at once and end, to go on another time; ``finish``: this is the end of training.
        reason: in words.
    """

    kind: Literal["leave", "finish"]
    reason: str


@dataclass
class Control:
    """One rank's end.

    A moment is twice the steps trained, and one more once they were evaluated.

    Attributes:
        exchange: the folder that ranks and launcher share; None for a lone rank that nobody controls.
        run_dir: the run's folder.
        rank: this one.
        every: steps after which all ranks have waited for each other: 1 on CPUs, where DDP does so in each step; on
            GPUs, which run ahead of one another, the steps between two reads of the loss.
        seconds: after which training is to finish, from now on; None: never.
    """

    exchange: Path | None = None
    run_dir: Path = Path()
    rank: int = 0
    every: int = 1
    seconds: float | None = None
    _moment: int = 0
    _stage: int = 0
    _signs: int = 0
    _file: int | None = None
    _began: float = field(default_factory=time.monotonic)  # not the wall clock, which may be set meanwhile

    def __post_init__(self) -> None:
        if self.exchange:
            self._file = os.open(self.exchange / f"beat-{self.rank}", os.O_WRONLY | os.O_CREAT, 0o600)
            self.beat()

    def beat(self) -> None:
        """A sign of life, and how far this rank is."""
        if self._file is not None:
            self._signs += 1
            os.pwrite(self._file, _BEAT.pack(os.getpid(), self._moment, self._stage, self._signs), 0)

    def got_on(self) -> None:
        """Called before this rank may wait for others on its way to a moment: who hangs has not come to that stage.

        All ranks have the same stages.
        """
        self._stage += 1
        self.beat()

    def ask(self, moment: int) -> None:
        """Called before all ranks wait for each other at ``moment``: the first one looks whether to end there."""
        if moment != self._moment:
            self._moment, self._stage = moment, 0
        self.beat()
        if self.rank == 0 and self.exchange and (request := self._look()):
            agreed = self.exchange / _AGREED_FILE
            if not agreed.exists():
                write_atomically(agreed, f"{moment} {request.kind} {request.reason}", durable=False)

    def agreed(self, moment: int) -> Request | None:
        """Called after all ranks have waited for each other at ``moment``: whether training ends; the same on each."""
        found = _agreed(self.exchange) if self.exchange else None
        return found[1] if found and moment >= found[0] else None

    def done(self) -> None:
        """Say that this rank has done its work: from now on its process may end."""
        if self.exchange:
            (self.exchange / f"done-{os.getpid()}").touch()

    def is_leaving(self) -> bool:
        """Whether the launcher waits for the ranks to end; what they compute now that is not training is in vain."""
        return self.exchange is not None and (self.exchange / LEAVE_FILE).exists()

    def _look(self) -> Request | None:
        if self.is_leaving():
            return Request("leave", "a signal")
        stop = self.run_dir / STOP_FILE
        if stop.exists():
            stop.unlink(missing_ok=True)  # or it would end the run that goes on from here, too
            return Request("finish", f"the file {stop.name} in the run's folder")
        if self.seconds is not None and time.monotonic() - self._began >= self.seconds:
            return Request("finish", "train.max_seconds")
        return None


def ended_by(exchange: Path) -> Request | None:
    """Why training ended before its last step; None where nothing ended it."""
    found = _agreed(exchange)
    return found[1] if found else None


def _agreed(exchange: Path) -> tuple[int, Request] | None:
    try:
        moment, kind, reason = (exchange / _AGREED_FILE).read_text().split(" ", 2)
    except FileNotFoundError:
        return None
    return int(moment), Request("leave" if kind == "leave" else "finish", reason)
