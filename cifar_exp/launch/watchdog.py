"""Detect ranks that died or hang."""

import os
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cifar_exp.distributed.heartbeat import Heartbeat, read_heartbeat
from cifar_exp.launch import rank_processes

ABSENCE_SECONDS = 15.0  # seconds without any live rank; a restart of ranks takes less


@dataclass
class Watchdog:
    """A thread in the launcher that kills hung ranks and detects ranks whose process ended without an error.

    If no rank sends a heartbeat for ``timeout`` seconds, at least one rank is hung and the others wait for it. The hung
    ranks are those whose process is suspended; if no process is, those with the lowest progress. The number of
    heartbeats is not compared: a rank with a larger evaluation shard sends more of them.

    Attributes:
        ipc_dir: the folder that ranks and launcher share.
        size: number of ranks on this host.
        timeout: seconds in which no rank sends a heartbeat; then the hung ranks are killed.
        first_rank: the first rank of this host.
        vanished: rank -> message, for ranks whose process ended without an error.
    """

    ipc_dir: Path
    size: int
    timeout: float
    first_rank: int = 0
    vanished: dict[int, str] = field(default_factory=dict)
    _ended: dict[int, tuple[int, str]] = field(default_factory=dict)  # killed rank -> process id, message
    _closed: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    @property
    def hung(self) -> dict[int, str]:
        """Killed ranks that were not restarted: rank -> message."""
        return {rank: message for rank, (_, message) in self._ended.items()}

    def _watch(self) -> None:
        interval = min(1.0, self.timeout / 10)
        quiet, absent, before = 0.0, 0.0, self._beats()
        while not self._closed.wait(interval):
            if not self.ipc_dir.exists():  # the temporary folder was removed: ranks cannot be reached any more
                rank_processes.kill_ranks()
                os.kill(os.getpid(), signal.SIGQUIT)
                return
            now = self._beats()
            # Time is counted in intervals, not read from the clock: launcher and ranks may be suspended together.
            quiet = quiet + interval if now == before and now else 0.0
            absent = absent + interval if self._find_dead_ranks(now) and now == before else 0.0
            before = now
            if absent >= ABSENCE_SECONDS:
                os.kill(os.getpid(), signal.SIGQUIT)  # elastic would wait forever
                return
            for rank in [rank for rank, (process, _) in self._ended.items() if now[rank].process != process]:
                del self._ended[rank]  # the rank was restarted
            if quiet >= self.timeout:
                self._end(now)
                quiet = 0.0

    def _beats(self) -> dict[int, Heartbeat]:
        """The newest heartbeat of each rank that has sent one."""
        beats = {
            rank: read_heartbeat(self.ipc_dir, rank) for rank in range(self.first_rank, self.first_rank + self.size)
        }
        return {rank: beat for rank, beat in beats.items() if beat}

    def _find_dead_ranks(self, beats: dict[int, Heartbeat]) -> bool:
        """Update ``vanished`` with ranks that ended before their work was done.

        Elastic treats exit code 0 as success. It would report the other ranks, which fail as a consequence. With a
        single rank it would wait forever.

        Returns:
            Whether no rank is left.
        """
        missing = {
            rank: beat.steps_trained
            for rank, beat in beats.items()
            if not _is_alive(beat.process) and not (self.ipc_dir / f"done-{beat.process}").exists()
        }
        if any(list(self.ipc_dir.glob(f"failure-*-{rank}.json")) for rank in missing):
            return False  # elastic has noticed the failure and is ending the other ranks
        message = "rank {} ended without an error after step {}, as os._exit(0) does"
        self.vanished = {rank: message.format(rank, step) for rank, step in missing.items()}
        return bool(missing) and len(missing) == len(beats)

    def _end(self, beats: dict[int, Heartbeat]) -> None:
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
