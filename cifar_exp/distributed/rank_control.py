"""One rank's side of the folder that it shares with the launcher: heartbeats to the launcher, stop requests from it."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from cifar_exp.distributed.heartbeat import Heartbeat, heartbeat_file
from cifar_exp.distributed.stop_requests import (
    INTERRUPT_FILE,
    KNOWN_TO_ALL_HOSTS_FILE,
    STOP_FILE,
    Request,
    StopPoint,
    agree,
    agreement,
)

LONGEST_REASON = 300  # characters


@dataclass
class RankControl:
    """Sends the heartbeats of one rank, and looks for stop requests.

    Attributes:
        ipc_dir: the folder that ranks and launcher share; None for a single rank without a launcher.
        run_dir: the run folder.
        rank: this rank.
        every: steps between two stop points. 1 on CPUs, where ranks wait for each other in each step. On GPUs, where
            the host runs ahead, the steps between two reads of the loss.
        seconds: training finishes after so many seconds from now; None: no limit.
        is_one_of_many_hosts: whether there are ranks on other hosts. They must know a stop point before rank 0 goes on.
    """

    ipc_dir: Path | None = None
    run_dir: Path = Path()
    rank: int = 0
    every: int = 1
    seconds: float | None = None
    is_one_of_many_hosts: bool = False
    _point: StopPoint = field(default_factory=lambda: StopPoint(0))
    _stage: int = 0
    _beats: int = 0
    _file: int | None = None
    _began: float = field(default_factory=time.monotonic)  # the wall clock may be set meanwhile

    def __post_init__(self) -> None:
        if self.ipc_dir:
            self._file = os.open(heartbeat_file(self.ipc_dir, self.rank), os.O_WRONLY | os.O_CREAT, 0o600)
            self.beat()

    def beat(self) -> None:
        """Send a heartbeat with the progress of this rank."""
        if self._file is not None:
            self._beats += 1
            beat = Heartbeat(os.getpid(), self._point, self._stage, self._beats)
            os.pwrite(self._file, beat.packed(), 0)

    def next_stage(self) -> None:
        """Call before each wait for other ranks between two stop points. All ranks have the same stages.

        When ranks wait for each other, the hung rank is the one at the lowest stage.
        """
        self._stage += 1
        self.beat()

    def approach(self, point: StopPoint) -> None:
        """Call before all ranks wait for each other at ``point``. Rank 0 looks for a request to stop there."""
        if point != self._point:
            self._point, self._stage = point, 0
        self.beat()
        if self.rank == 0 and self.ipc_dir and (request := self._look_for_request()):
            agree(self.ipc_dir, point, request)
            while self.is_one_of_many_hosts and not (self.ipc_dir / KNOWN_TO_ALL_HOSTS_FILE).exists():
                time.sleep(0.01)  # a lost host ends this process

    def agreed(self, point: StopPoint) -> Request | None:
        """Call after all ranks have waited for each other at ``point``. The same request on every rank, or None."""
        found = agreement(self.ipc_dir) if self.ipc_dir else None
        return found[1] if found and point >= found[0] else None

    def done(self) -> None:
        """Mark this rank's work as done: from now on its process may end."""
        if self.ipc_dir:
            (self.ipc_dir / f"done-{os.getpid()}").touch()

    def is_interrupted(self) -> bool:
        """Whether the launcher has asked the ranks to save and exit.

        The running step is finished; evaluation is cut short.
        """
        return self.ipc_dir is not None and (self.ipc_dir / INTERRUPT_FILE).exists()

    def _look_for_request(self) -> Request | None:
        if self.is_interrupted():
            return Request("interrupt", "a signal")
        stop = self.run_dir / STOP_FILE
        if stop.is_file():  # a folder of that name cannot be removed by a rank, and is no request
            reason = _first_words(stop)
            stop.unlink(missing_ok=True)  # remove the file, or it would stop the resumed run as well
            return Request("stop", reason or f"the file {stop.name} in the run's folder")
        if self.seconds is not None and time.monotonic() - self._began >= self.seconds:
            return Request("stop", "train.max_seconds is over; it counts from the start of the command")
        return None


def _first_words(path: Path) -> str:
    """The text of a stop file in one line: it may say why training is to end."""
    try:
        return " ".join(path.read_text(errors="replace")[:LONGEST_REASON].split())
    except OSError:
        return ""
