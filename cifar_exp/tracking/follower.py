"""Follow the journal and deliver its lines, with retries after an outage."""

import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

from cifar_exp.records.journal import JOURNAL_FILE, Entry, JournalFollower
from cifar_exp.records.run_folder import Status, sync_command
from cifar_exp.system.redaction import masked_text

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


def lacking(error: Exception, folder: Path) -> str:
    """What to tell of a tracker that did not get everything, down to the command that delivers it."""
    path = folder / JOURNAL_FILE if (folder / JOURNAL_FILE).exists() else folder
    return (
        f"the tracker did not get everything: {shortened(error)}. "
        f"It is all in {path}. Once the tracker can be reached, type\n{sync_command(folder)}"
    )


def shortened(error: Exception) -> str:
    """What an error says in a line, not the whole chain of calls; MLflow's ``mlflow db upgrade`` is within 180."""
    lines = masked_text(str(error).strip() or type(error).__name__).splitlines()
    text = next((line for line in lines if not line.startswith("(raised as a result of")), lines[0])
    return text if len(text) <= 260 else f"{text[:180]} ... {text[-75:]}"
