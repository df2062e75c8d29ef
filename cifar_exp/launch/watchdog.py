"""Detect ranks that died or hang."""

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
        decides: whether it finds and kills hung ranks. With several hosts, host 0 finds them among the ranks of all.
        vanished: rank -> message, for ranks whose process ended without an error.
    """

    ipc_dir: Path
    size: int
    timeout: float
    first_rank: int = 0
    decides: bool = True
    vanished: dict[int, str] = field(default_factory=dict)
    _ended: dict[int, tuple[int, str]] = field(default_factory=dict)  # killed rank -> process id, message
    _silent: dict[int, Heartbeat] = field(default_factory=dict)
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

    def silent_states(self) -> list["RankState"]:
        """The state of each rank here if none has sent a heartbeat for ``timeout`` seconds; else empty."""
        return [
            RankState(rank, beat.steps_trained, (*beat.point, beat.stage), _is_stopped(beat.process))
            for rank, beat in self._silent.items()
        ]

    def end(self, hung: Mapping[int, str]) -> None:
        """Kill those of the hung ranks that are here.

        Args:
            hung: rank -> message.
        """
        for rank, beat in self._beats().items():
            if rank in hung and rank not in self._ended:
                self._ended[rank] = beat.process, hung[rank]
                with suppress(ProcessLookupError):
                    os.kill(beat.process, signal.SIGKILL)

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
            self._silent = now if quiet >= self.timeout else {}
            if self._silent and self.decides:
                self.end(hung_ranks(self.silent_states(), self.timeout))
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


@dataclass(frozen=True)
class RankState:
    """A rank that sends no heartbeats.

    Attributes:
        rank: which rank.
        steps_trained: steps that it has trained.
        progress: its progress, for comparison.
        is_suspended: whether its process is.
    """

    rank: int
    steps_trained: int
    progress: Sequence[int]
    is_suspended: bool


def hung_ranks(states: Sequence[RankState], timeout: float) -> dict[int, str]:
    """The hung ranks among ranks that all wait: rank -> message. See :class:`Watchdog`."""
    lowest = min(tuple(state.progress) for state in states)
    suspended = [state for state in states if state.is_suspended]
    hung = suspended or [state for state in states if tuple(state.progress) == lowest]
    several = len(hung) > 1
    who = f"rank{'s'[:several]} {' and '.join(str(state.rank) for state in hung)}"
    why = f"no heartbeat for launcher.timeout={timeout:g} s"
    if suspended:
        why += f", {'they are' if several else 'it is'} stopped"
    return {state.rank: f"{who} hung after step {state.steps_trained} ({why})" for state in hung}


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
