"""Follows a run's journal from the parent process and passes it on, to a display and to a tracker.

The journal on disk is the truth. Each sink has a thread of its own, which nothing ever waits for without a limit: a
tracker that cannot be reached, or does not answer, costs the training nothing and its end a bounded time.
"""

import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Protocol

from cifar_exp.errors import FREE_SPACE, CifarExpError, Stopped, StorageError, TrackingError, storage_errors
from cifar_exp.journal import FILE_NAME, Entry, JournalFollower, JournalWriter, read
from cifar_exp.privacy import masked_text
from cifar_exp.record import Outcome, Status, owe, settle, sync_command

BATCH = 500  # entries that are read, and held, at a time
PATIENCE = 30.0  # seconds that the end of a run waits for a tracker that takes nothing
STOPPED_PATIENCE = 8.2  # from the signal that has stopped the run on; ranks may have taken most of it
LEAST_PATIENCE = 0.8  # of each sink all the same; page, tracker and sweep are through within ten seconds
LONGEST = 120.0  # the same for one that is slow and does not fail, in all: on a busy machine, in imports, for the page
LAST_TRY = 5.0  # the same where the tracker has refused all along, in a run that has lasted longer than PATIENCE
LONGEST_PAUSE = 30.0  # seconds between two tries
SHORTEST_PAUSE = 1.0


class Sink(Protocol):
    """Something that takes a run's journal while it grows. All calls come from one thread.

    A call that has failed is made again with the same arguments, unless ``is_final`` says that this would not help.
    """

    def open(self) -> None: ...

    def write(self, entries: Sequence[Entry]) -> None: ...

    def close(self, status: Status) -> None: ...

    def is_final(self, error: Exception) -> bool:
        """Whether trying again cannot mend ``error``."""
        ...


class _GivenUpError(Exception):
    """There is no time left to try again."""


class Follower(threading.Thread):
    """Passes the journal on to one sink from a thread of its own, until told how the run ended.

    An entry counts as passed on once the sink has taken it. What it refuses is tried again after growing pauses.

    Attributes:
        sink: what the journal is passed on to.
        error: why it lacks something at the moment; None where it has everything that it was to have.
    """

    def __init__(self, run_dir: Path, sink: Sink, interval: float) -> None:
        """``interval``: seconds between two looks at the journal."""
        # A daemon: a sink that hangs in a call must not keep the process from ending.
        super().__init__(name=f"follower of {type(sink).__name__}", daemon=True)
        self.sink = sink
        self.error: Exception | None = None
        self._journal, self._interval = JournalFollower(run_dir), interval
        self._status: Status | None = None
        self._began, self._ended, self._deadline = time.monotonic(), math.inf, math.inf
        self._patience, self._longest = math.inf, math.inf
        self._reached = self._told = self._left = False
        self._wanted = self._passed = 0  # looks asked for and done
        self._changed, self._over = threading.Condition(), threading.Event()

    def run(self) -> None:
        try:
            self._persist(self.sink.open)
            while not self._look():
                pass
            assert self._status
            self._persist(partial(self.sink.close, self._status))
        except _GivenUpError as error:
            self._note(self.error or error)
        except Exception as error:
            self._fail(error)
        finally:
            self._over.set()

    def flush(self, timeout: float) -> None:
        """Wait until everything that the journal holds now was passed on, the sink has failed, or the time is over."""
        with self._changed:
            self._wanted += 1
            wanted = self._wanted
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._passed >= wanted or self.error, timeout)

    def finish(self, status: Status, patience: float, longest: float = LONGEST) -> None:
        """Pass on what is left and close the sink; one that takes nothing for ``patience`` seconds is left alone.

        ``longest``: seconds that it gets in all, whatever it takes meanwhile.
        """
        with self._changed:
            self._ended, self._longest = time.monotonic(), longest
            self._patience, self._deadline = patience, self._ended + patience
            self._status = status
            self._wanted += 1
            self._changed.notify_all()
        # Not joined: where a signal raises in Thread.join, Python 3.11 takes the thread for one that has ended.
        while not self._over.is_set() and (left := self._limit() - time.monotonic()) > 0:
            self._over.wait(min(left, 0.2))  # the limit moves
        with self._changed:
            if not self._over.is_set():
                self._left = True
                self.error = self.error or _GivenUpError("no answer in time")

    def _limit(self) -> float:
        """Until when the sink is tried, on the monotonic clock."""
        return min(self._wanted_limit(), self._ended + self._longest)

    def _wanted_limit(self) -> float:
        """One that is slow to open gets its time in any run that was not stopped."""
        if self._reached:
            return self._deadline
        if self.error:
            return max(self._ended + LAST_TRY, min(self._deadline, self._began + PATIENCE))
        return max(self._deadline, self._began + LONGEST)

    def _look(self) -> bool:
        """Wait for the next look, pass on what is new; whether it was the last look."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanted > self._passed, timeout=self._interval)
            wanted, last = self._wanted, self._status is not None
        while entries := list(islice(self._journal.new_entries(), BATCH)):
            self._persist(partial(self.sink.write, entries))
        with self._changed:
            self._passed = wanted
            self._changed.notify_all()
        return last

    def _persist(self, action: Callable[[], None]) -> None:
        """Do it, again and again where it fails, until it is done.

        Raises:
            Exception: what cannot be mended.
            _GivenUpError: where there is no time left.
        """
        failures = 0
        while True:
            if self._left or time.monotonic() > self._limit():
                raise _GivenUpError("there was no time left")
            try:
                action()
            except Exception as error:
                if self.sink.is_final(error):
                    raise
                failures += 1
                self._note(error)
                if failures == 2 and not self._told:  # one alone is soon made good: a connection that was closed
                    self._told = True
                    self._tell(f"tracker unreachable, training goes on, trying again: {shortened(error)}")
                self._pause(failures)
            else:
                self._reached = True
                self._deadline = min(time.monotonic() + self._patience, self._ended + LONGEST)
                self._note(None)
                if self._told:
                    self._told = False
                    self._tell("the tracker is back and gets what it has missed")
                return

    def _pause(self, failures: int) -> None:
        """Wait before the next try: longer after each failure, but not once the run has ended."""
        pause = min(LONGEST_PAUSE, SHORTEST_PAUSE * 2 ** (failures - 1))
        with self._changed:
            if self._status is None:
                self._changed.wait_for(lambda: self._status is not None, pause)
                return
        time.sleep(SHORTEST_PAUSE)

    def _note(self, error: Exception | None) -> None:
        with self._changed:
            if not self._left:
                self.error = error
                self._changed.notify_all()

    def _tell(self, line: str) -> None:
        if not self._left:  # else the user has been told what to do
            print(f"cifar-exp: {line}", file=sys.stderr, flush=True)

    def _fail(self, error: Exception) -> None:
        """The sink gets nothing more but word of the end, which it may still be able to take."""
        self._tell(f"{type(self.sink).__name__} failed, training goes on: {shortened(error)}")
        self._note(error)
        with self._changed:
            self._changed.wait_for(lambda: self._status is not None)
        try:
            assert self._status
            self.sink.close(self._status)
        except Exception:  # the first error is the one to tell
            return


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
                told = f"{well}its page or figure could not be written: {shortened(follower.error)}"
                advice = "" if FREE_SPACE in told or isinstance(follower.error, _GivenUpError) else f". {FREE_SPACE}"
                problems.append(StorageError(f"{self.run_dir}: {told}{advice}"))
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


def lacking(error: Exception, folder: Path) -> str:
    """What to tell of a tracker that did not get everything, down to the command that delivers it."""
    path = folder / FILE_NAME if (folder / FILE_NAME).exists() else folder
    return (
        f"the tracker did not get everything: {shortened(error)}. "
        f"It is all in {path}. Once the tracker can be reached, type\n{sync_command(folder)}"
    )


def shortened(error: Exception) -> str:
    """What an error says in a line, not the whole chain of calls; MLflow's ``mlflow db upgrade`` is within 180."""
    lines = masked_text(str(error).strip() or type(error).__name__).splitlines()
    text = next((line for line in lines if not line.startswith("(raised as a result of")), lines[0])
    return text if len(text) <= 260 else f"{text[:180]} ... {text[-75:]}"
