"""Follows a run's journal from the parent process and passes it on, to a display and to a tracker.

The journal on disk is the truth. Each sink has a thread of its own, which nothing ever waits for without a limit: a
tracker that cannot be reached, or does not answer, costs the training nothing and its end a bounded time.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType

from cifar_exp.errors import FREE_SPACE, CifarExpError, Stopped, StorageError, TrackingError, storage_errors
from cifar_exp.records.journal import Entry, JournalWriter, read
from cifar_exp.records.run_folder import Outcome, Status, owe, settle
from cifar_exp.system.bugs import BugError, described, is_bug
from cifar_exp.tracking.follower import (
    LEAST_PATIENCE,
    LONGEST,
    PATIENCE,
    STOPPED_PATIENCE,
    Follower,
    Sink,
    _GivenUpError,
    lacking,
    shortened,
)


@dataclass
class Recording:
    """Follows one run's journal with a display and a tracker, from ``with`` to its end.

    The run is closed as FINISHED, FAILED (an exception) or KILLED (a signal), on disk first. A signal that comes when
    training has ended is answered once the run is closed, which then takes less time.

    Attributes:
        run_dir: the run's folder.
        started: when the run began, on the monotonic clock; time between its sessions left out.
        tracker: records it; None where nothing does.
        store: where that keeps it.
        closing: metrics of the parent's own, for the last entry.
    """

    run_dir: Path
    started: float
    tracker: Sink | None
    store: str = ""
    closing: dict[str, float] = field(default_factory=dict)
    _followers: list[Follower] = field(default_factory=list)
    _stopped: Stopped | None = None
    _deadline: float = math.inf  # of a run that is stopped
    _waited: float = 0.0  # seconds for the tracker, when training had ended

    def __enter__(self) -> "Recording":
        Outcome.forget(self.run_dir)
        if self.tracker:
            owe(self.run_dir, self.store)
        return self

    def start(self, display: Sink) -> None:
        """Follow the journal from now on: show it to a person, and record it."""
        # The page first: it is among the files that the tracker keeps at the end.
        self._followers.append(Follower(self.run_dir, display, interval=0.5))
        self._start_tracker()
        self._followers[0].start()

    def _start_tracker(self) -> None:
        if self.tracker:
            self._followers.append(Follower(self.run_dir, self.tracker, interval=2.0))
            self._followers[-1].start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close everything; a tracker that failed is the run's error where there is no worse one.

        Raises:
            TrackingError: where training went well but the tracker did not get everything.
            Stopped: where a signal came meanwhile.
        """
        if not self._followers:  # the run failed before it could start, which is recorded too
            self._start_tracker()
        error = Stopped.behind(error) or error
        status: Status = "FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED"
        if status == "KILLED":
            self._hurry(error.received if isinstance(error, Stopped) else time.monotonic())
        try:
            if error is None:
                self._in_spite_of_a_signal(self._write_last_entry)
        except BaseException:
            status = "FAILED"
            raise
        finally:
            problems = self._close(status)
            if status == "FINISHED" and problems and not self._stopped:
                raise problems[0]
            if self._stopped and isinstance(error, CifarExpError):
                problems.append(error)
            for problem in problems:  # the run has a worse one, which the user is told too
                print(f"cifar-exp: {problem}", file=sys.stderr, flush=True)
            if self._stopped:
                raise self._stopped

    def _in_spite_of_a_signal(self, action: Callable[[], None]) -> None:
        """Do it, and do it again where a signal comes meanwhile. No later one raises anything."""
        try:
            action()
        except Stopped as stopped:
            self._stopped = stopped
            self._hurry(stopped.received)
            print("cifar-exp: the run is being closed", file=sys.stderr, flush=True)
            action()

    def _hurry(self, received: float) -> None:
        self._deadline = min(self._deadline, received + STOPPED_PATIENCE)

    def _close(self, status: Status) -> list[CifarExpError]:
        """Write down how the run ended, on disk and then elsewhere; what could not be written."""
        problems: list[CifarExpError] = []
        try:
            with storage_errors(self.run_dir, FREE_SPACE):
                self._in_spite_of_a_signal(lambda: Outcome(status, time.time()).save(self.run_dir))
        except StorageError as error:
            problems.append(error)
        well = "training finished and nothing is lost, but " if status == "FINISHED" else ""
        for follower in self._followers:
            is_tracker = follower.sink is self.tracker
            self._in_spite_of_a_signal(partial(self._finish, follower, status))
            if follower.error and is_tracker:
                problems.append(TrackingError(f"tracking.uri: {well}{lacking(follower.error, self.run_dir)}"))
            elif follower.error:
                problems.append(_not_shown(follower.error, self.run_dir, well))
            elif is_tracker:
                settle(self.run_dir, self.store)
        return problems

    def _finish(self, follower: Follower, status: Status) -> None:
        if math.isfinite(self._deadline):
            left = max(LEAST_PATIENCE, self._deadline - time.monotonic())
            follower.finish(status, left, longest=left)
        elif follower.sink is self.tracker:
            follower.finish(status, max(LEAST_PATIENCE, PATIENCE - self._waited))
        else:
            follower.finish(status, LONGEST)

    def _write_last_entry(self) -> None:
        """The ranks have ended: add the total, and what of it none of them could know."""
        ranks_ended = time.monotonic()
        for follower in self._followers:
            if not self._stopped:
                began = time.monotonic()
                follower.flush(PATIENCE)
                if follower.sink is self.tracker:
                    self._waited = time.monotonic() - began
        entries = read(self.run_dir)
        if not entries:
            return
        last = entries[-1]
        now = time.monotonic()
        total, tracking = now - self.started, now - ranks_ended
        split = sum(value for name, value in last.metrics.items() if name.startswith("time_split/"))
        metrics = {
            "time/total_seconds": total,
            "time_split/tracking": tracking,
            "time_split/other": total - tracking - split,
            **self.closing,
        }
        writer = JournalWriter(self.run_dir)
        writer.write(Entry(last.step, last.epoch, total, metrics))
        writer.close()


def _not_shown(error: Exception, run_dir: Path, well: str) -> CifarExpError:
    """What to tell where the page or figure is not as it should be: storage is blamed for its own errors alone.

    Args:
        error: why.
        run_dir: the run's folder.
        well: how the training ended, where it ended well.
    """
    told = f"{run_dir}: {well}its page or figure could not be"
    if isinstance(error, StorageError | _GivenUpError):
        return StorageError(f"{told} written: {shortened(error)}")
    if isinstance(error, OSError):
        return StorageError(f"{told} written: {shortened(error)}. {FREE_SPACE}")
    if is_bug(error):
        return BugError(error, f"{run_dir}: {well}its page or figure was not drawn: ")
    return StorageError(f"{told} drawn: {described(error)}")
