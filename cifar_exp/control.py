"""What ranks and their launcher tell each other while training: signs of life up, wishes to stop down.

Both are files in the launcher's private folder, ``exchange``, which all ranks of a machine share. A wish must hold for
all ranks at the same moment, or some would wait for the others forever. So the first rank looks for it before a moment
at which all ranks wait for each other, and writes down that moment; when it comes, every rank can read that.
"""

import os
import signal
import struct
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

STOP_FILE = "stop"  # in the run's folder: made by a user who wants training to end here
LEAVE_FILE = "leave"  # in the exchange folder: made by the launcher, for a signal
_AGREED_FILE = "agreed"
ABSENCE = 15.0  # seconds without any rank; those that are replaced are away for a shorter time
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
                temporary = agreed.with_suffix(".tmp")
                temporary.write_text(f"{moment} {request.kind} {request.reason}")
                temporary.replace(agreed)

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


@dataclass
class Watchdog:
    """In the launcher: ends ranks that have given no sign of life for ``timeout`` seconds, and misses those that left.

    When one rank hangs, the others wait for it and give none either: ended is who is stopped, else who has got least
    far. That is not told by the signs of life, of which a rank with a larger share of what is evaluated gives more.

    Attributes:
        exchange: the folder that ranks and launcher share.
        ranks: how many there are.
        timeout: seconds.
    """

    exchange: Path
    ranks: int
    timeout: float
    vanished: dict[int, str] = field(default_factory=dict)  # ranks that ended without a word, with what to say of each
    _ended: dict[int, tuple[int, str]] = field(default_factory=dict)  # rank -> process, what to say of it
    _closed: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    @property
    def hung(self) -> dict[int, str]:
        """Ranks that were ended and not replaced, with what to say of each."""
        return {rank: told for rank, (_, told) in self._ended.items()}

    def _watch(self) -> None:
        interval = min(1.0, self.timeout / 10)
        quiet, absent, before = 0.0, 0.0, self._beats()
        while not self._closed.wait(interval):
            now = self._beats()
            # Counted by looks, not by the clock: the launcher may have been suspended together with its ranks.
            quiet = quiet + interval if now == before and now else 0.0
            absent = absent + interval if self._is_nobody_there(now) and now == before else 0.0
            before = now
            if absent >= ABSENCE:
                os.kill(os.getpid(), signal.SIGQUIT)  # elastic would wait for ever
                return
            for rank in [rank for rank, (process, _) in self._ended.items() if now[rank][0] != process]:
                del self._ended[rank]  # another process has its place
            if quiet >= self.timeout:
                self._end(now)
                quiet = 0.0

    def _beats(self) -> dict[int, tuple[int, int, int, int]]:
        """Process id, moment, stage and signs of life of each rank that has given one."""
        found = {}
        for rank in range(self.ranks):
            try:
                found[rank] = _BEAT.unpack((self.exchange / f"beat-{rank}").read_bytes())
            except (FileNotFoundError, struct.error):
                continue
        return found

    def _is_nobody_there(self, beats: dict[int, tuple[int, int, int, int]]) -> bool:
        """Note ranks that have left without having done their work; whether no rank is left.

        For elastic a process that ends with exit code 0 has done it. Its peers fail, and would be blamed; where it has
        none, elastic waits for its result.
        """
        missing = {
            rank: _trained(moment)
            for rank, (process, moment, *_) in beats.items()
            if not _is_alive(process) and not (self.exchange / f"done-{process}").exists()
        }
        if any(list(self.exchange.glob(f"failure-*-{rank}.json")) for rank in missing):
            return False  # elastic knows, and is ending the others
        told = "ended without a word after step {}, as os._exit(0) does"
        self.vanished = {rank: f"rank {rank} {told.format(step)}" for rank, step in missing.items()}
        return bool(missing) and len(missing) == len(beats)

    def _end(self, beats: dict[int, tuple[int, int, int, int]]) -> None:
        stopped = [rank for rank, (process, *_) in beats.items() if _is_stopped(process)]
        least = min((moment, stage) for _, moment, stage, _ in beats.values())
        ranks = stopped or [rank for rank, (_, moment, stage, _) in beats.items() if (moment, stage) == least]
        several = len(ranks) > 1
        who = f"rank{'s'[:several]} {' and '.join(map(str, ranks))}"
        why = f"no sign of life for launcher.timeout={self.timeout:g} s"
        if stopped:
            why += f", {'they are' if several else 'it is'} stopped"
        for rank in ranks:
            process, moment, *_ = beats[rank]
            told = f"{who} hung after step {_trained(moment)} ({why})"
            self._ended[rank] = process, told
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _trained(moment: int) -> int:
    """Steps trained by a rank on its way to a moment."""
    return max(0, moment - 1) // 2


def _is_alive(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _is_stopped(process: int) -> bool:
    try:
        return bool(psutil.Process(process).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP))
    except psutil.Error:
        return False
