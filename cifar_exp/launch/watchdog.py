"""Notice ranks that died or hang."""

import os
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cifar_exp.distributed.heartbeat import Beat, read_beat

ABSENCE = 15.0  # seconds without any rank; those that are replaced are away for a shorter time


@dataclass
class Watchdog:
    """Runs in the launcher. Ends hung ranks, and notices ranks whose process ended without a word.

    Ranks hang when none has given a heartbeat for ``timeout`` seconds. One hung rank makes the others wait, so they
    give no heartbeat either. The hung rank is one whose process is stopped, else the one with the lowest progress. The
    number of heartbeats says nothing: a rank with a larger share of the evaluation gives more of them.

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
            for rank in [rank for rank, (process, _) in self._ended.items() if now[rank].process != process]:
                del self._ended[rank]  # another process has its place
            if quiet >= self.timeout:
                self._end(now)
                quiet = 0.0

    def _beats(self) -> dict[int, Beat]:
        """The newest heartbeat of each rank that has given one."""
        beats = {rank: read_beat(self.exchange, rank) for rank in range(self.ranks)}
        return {rank: beat for rank, beat in beats.items() if beat}

    def _is_nobody_there(self, beats: dict[int, Beat]) -> bool:
        """Note ranks that have left without having done their work; whether no rank is left.

        For elastic a process that ends with exit code 0 has done it. Its peers fail, and would be blamed; where it has
        none, elastic waits for its result.
        """
        missing = {
            rank: beat.steps_trained
            for rank, beat in beats.items()
            if not _is_alive(beat.process) and not (self.exchange / f"done-{beat.process}").exists()
        }
        if any(list(self.exchange.glob(f"failure-*-{rank}.json")) for rank in missing):
            return False  # elastic knows, and is ending the others
        told = "ended without a word after step {}, as os._exit(0) does"
        self.vanished = {rank: f"rank {rank} {told.format(step)}" for rank, step in missing.items()}
        return bool(missing) and len(missing) == len(beats)

    def _end(self, beats: dict[int, Beat]) -> None:
        stopped = [rank for rank, beat in beats.items() if _is_stopped(beat.process)]
        lowest = min(beat.progress for beat in beats.values())
        ranks = stopped or [rank for rank, beat in beats.items() if beat.progress == lowest]
        several = len(ranks) > 1
        who = f"rank{'s'[:several]} {' and '.join(map(str, ranks))}"
        why = f"no heartbeat for launcher.timeout={self.timeout:g} s"
        if stopped:
            why += f", {'they are' if several else 'it is'} stopped"
        for rank in ranks:
            beat = beats[rank]
            message = f"{who} hung after step {beat.steps_trained} ({why})"
            self._ended[rank] = beat.process, message
            try:
                os.kill(beat.process, signal.SIGKILL)
            except ProcessLookupError:
                continue


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
