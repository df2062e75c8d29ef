"""Follow a run's journal in the parent process and deliver it to a display and to a tracker.

The journal on disk is the source of truth. Each sink has its own thread, and every wait for a thread has a limit. So a
tracker that is unreachable or hangs does not slow training, and delays the end of the run by a bounded time.
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
from cifar_exp.records.run_folder import Outcome, Status, mark_delivered, mark_undelivered
from cifar_exp.system.bugs import BugError, described, is_bug
from cifar_exp.system.printable import print_notice
from cifar_exp.tracking import deadlines
from cifar_exp.tracking.follower import Follower, GivenUpError, Sink, undelivered_message
from cifar_exp.tracking.store_problems import shortened_error


@dataclass
class Recording:
    """The delivery of one run's journal, as a context manager around the run.

    At its end the run is closed as FINISHED, FAILED (an exception) or KILLED (a signal), first on disk and then in the
    tracker. A signal after the end of training shortens the deadlines and is raised once the run is closed.

    Attributes:
        run_dir: the run's folder.
        started: start of the run on the monotonic clock, shifted so that pauses between kill and resume do not count.
        tracker: receives the journal; None without a tracker.
        store: the tracker's store, as text.
        final_metrics: metrics measured by the parent, for the last entry.
    """

    run_dir: Path
    started: float
    tracker: Sink | None
    store: str = ""
    final_metrics: dict[str, float] = field(default_factory=dict)
    _followers: list[Follower] = field(default_factory=list)
    _stopped: Stopped | None = None
    _signalled: float = math.inf  # when the first signal was received, on the monotonic clock
    _waited: float = 0.0  # seconds for the tracker after the end of training

    def __enter__(self) -> "Recording":
        Outcome.forget(self.run_dir)
        if self.tracker:
            mark_undelivered(self.run_dir, self.store)
        return self

    def start(self, display: Sink) -> None:
        """Start to follow the journal: display it and deliver it to the tracker."""
        # The display first: its page is among the files that the tracker stores at the end.
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
        """Close everything. A failed tracker is the run's error unless there is a worse one.

        Raises:
            TrackingError: if training finished but the tracker lacks something.
            Stopped: if a signal came while closing.
        """
        if not self._followers:  # the run failed before training; this is also delivered
            self._start_tracker()
        error = Stopped.cause_of(error) or error
        status: Status = "FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED"
        if status == "KILLED":
            self._shorten_deadlines(error.received if isinstance(error, Stopped) else time.monotonic())
        try:
            if error is None:
                self._call_despite_signals(self._write_last_entry)
        except BaseException:
            status = "FAILED"
            raise
        finally:
            problems = self._close(status)
            if status == "FINISHED" and problems and not self._stopped:
                raise problems[0]
            if self._stopped and isinstance(error, CifarExpError):
                problems.append(error)
            for problem in problems:  # the worse error is raised
                print_notice(problem)
            if self._stopped:
                raise self._stopped

    def _call_despite_signals(self, action: Callable[[], None]) -> None:
        """Call ``action``; call it again if a signal interrupts it. Later signals do not raise."""
        try:
            action()
        except Stopped as stopped:
            self._stopped = stopped
            self._shorten_deadlines(stopped.received)
            print("cifar-exp: the run is being closed", file=sys.stderr, flush=True)
            action()

    def _shorten_deadlines(self, received: float) -> None:
        self._signalled = min(self._signalled, received)

    def _close(self, status: Status) -> list[CifarExpError]:
        """Save how the run ended, on disk and then in the sinks; returns the errors."""
        problems: list[CifarExpError] = []
        try:
            with storage_errors(self.run_dir, FREE_SPACE):
                self._call_despite_signals(lambda: Outcome(status, time.time()).save(self.run_dir))
        except StorageError as error:
            problems.append(error)
        well = "training finished and nothing is lost, but " if status == "FINISHED" else ""
        for one in self._followers:
            is_tracker = one.sink is self.tracker
            self._call_despite_signals(partial(self._finish, one, status))
            if one.error and is_tracker:
                problems.append(TrackingError(f"tracking.uri: {well}{undelivered_message(one.error, self.run_dir)}"))
            elif one.error:
                problems.append(_not_shown(one.error, self.run_dir, well))
            elif is_tracker:
                mark_delivered(self.run_dir, self.store)
        return problems

    def _finish(self, one: Follower, status: Status) -> None:
        if math.isfinite(self._signalled):
            left = deadlines.seconds_after_signal(self._signalled)
            one.finish(status, left, left)
        elif one.sink is self.tracker:
            one.finish(status, max(deadlines.LEAST_SECONDS, deadlines.ANSWER_SECONDS - self._waited))
        else:
            one.finish(status, deadlines.CLOSING_SECONDS)

    def _write_last_entry(self) -> None:
        """After the ranks have ended, add the total time and the times that only the parent measures."""
        ranks_ended = time.monotonic()
        for one in self._followers:
            if not self._stopped:
                began = time.monotonic()
                one.flush(deadlines.ANSWER_SECONDS)
                if one.sink is self.tracker:
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
            **self.final_metrics,
        }
        writer = JournalWriter(self.run_dir)
        writer.write(Entry(last.step, last.epoch, total, metrics))
        writer.close()


def _not_shown(error: Exception, run_dir: Path, well: str) -> CifarExpError:
    """The error for a page or figure that failed: a storage error only if storage caused it.

    Args:
        error: why the page or figure failed.
        run_dir: the run's folder.
        well: how the training ended, if it ended well.
    """
    problem = f"{run_dir}: {well}its page or figure could not be"
    if isinstance(error, StorageError | GivenUpError):
        return StorageError(f"{problem} written: {shortened_error(error)}")
    if isinstance(error, OSError):
        return StorageError(f"{problem} written: {shortened_error(error)}. {FREE_SPACE}")
    if is_bug(error):
        return BugError(error, f"{run_dir}: {well}its page or figure was not drawn: ")
    return StorageError(f"{problem} drawn: {described(error)}")
