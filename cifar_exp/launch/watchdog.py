"""Notice ranks that died or hang."""

import os
import signal
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cifar_exp.distributed.heartbeat import _BEAT

ABSENCE = 15.0  # seconds without any rank; those that are replaced are away for a shorter time


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
