"""End trials that are worse than the others: report each epoch of their journals, and stop their runs."""

import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cifar_exp.distributed.stop_requests import STOP_FILE
from cifar_exp.errors import StorageError
from cifar_exp.records.journal import JournalReader
from cifar_exp.sweeps.search_study import SearchStudy
from cifar_exp.system.atomic_files import write_atomically
from cifar_exp.system.printable import print_notice

METRIC = "val/accuracy"
POLL_SECONDS = 0.5


@dataclass
class _Watched:
    """A trial that trains.

    Attributes:
        trial: Optuna's.
        folder: its run folder.
        reader: of its journal.
        reason: why it was asked to end; empty if it was not.
    """

    trial: Any
    folder: Path
    reader: JournalReader
    reason: str = ""


@dataclass
class Pruning:
    """Watches the running trials in a thread, while the context is open.

    A run that is to end gets the file ``stop`` with the reason in its folder: it stops at its next step, validates,
    tests and is recorded like a run that the user stopped.
    """

    study: SearchStudy
    _running: dict[int, _Watched] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _over: threading.Event = field(default_factory=threading.Event)
    _is_broken: bool = False

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._watch, name="pruning", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(5)

    def begin(self, trial: Any, folder: Path) -> None:
        """Watch a trial from now on."""
        with self._lock:
            self._running[trial.number] = _Watched(trial, folder, JournalReader(folder))

    def end(self, trial: Any) -> str:
        """Stop watching a trial that has ended. Returns why it was pruned; empty if it was not."""
        with self._lock:
            watched = self._running.pop(trial.number)
            if not watched.reason:
                with suppress(StorageError, ValueError, OSError):
                    self._report(watched, may_prune=False)
            stop = watched.folder / STOP_FILE
            if watched.reason and stop.is_file():  # training had ended before the file was read
                stop.unlink()
                return ""
            return watched.reason

    def _watch(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            with self._lock:
                for watched in self._running.values():
                    if watched.reason:
                        continue
                    try:
                        self._report(watched, may_prune=True)
                    except (StorageError, ValueError, OSError) as error:  # the trial goes on
                        if not self._is_broken:
                            print_notice(f"trials are no longer pruned: {error}")
                        self._is_broken = True
                        return

    def _report(self, watched: _Watched, may_prune: bool) -> None:
        for entry in watched.reader.new_entries():
            if METRIC not in entry.metrics:
                continue
            accuracy = entry.metrics[METRIC]
            median = self.study.report(watched.trial, entry.epoch, accuracy)
            if may_prune and median is not None:
                watched.reason = (
                    f"pruned: validation accuracy {accuracy:.4f} after epoch {entry.epoch}, median of the completed "
                    f"trials {median:.4f}"
                )
                write_atomically(watched.folder / STOP_FILE, watched.reason)
                return
