"""Follow the journal of a run and deliver its lines to one sink, with retries after an outage."""

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential

from cifar_exp.errors import TrackingError
from cifar_exp.records.journal import JOURNAL_FILE, Entry, JournalReader
from cifar_exp.records.run_folder import Status
from cifar_exp.system.bugs import bug_text, is_bug
from cifar_exp.system.printable import print_notice
from cifar_exp.tracking.deadlines import CLOSING_SECONDS, Deadlines
from cifar_exp.tracking.own_store import sync_command
from cifar_exp.tracking.store_problems import advice, shortened_error

BATCH = 500  # entries that are read, and held in memory, at a time
SHORTEST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two tries; the pause doubles with each failure


class Sink(Protocol):
    """Receives the journal of a run while it grows. All calls come from one thread.

    A call that fails is repeated with the same arguments, unless ``is_final`` says that this cannot help.
    """

    def open(self) -> None: ...

    def write(self, entries: Sequence[Entry]) -> None: ...

    def close(self, status: Status) -> None: ...

    def is_final(self, error: Exception) -> bool:
        """Whether another try cannot succeed after ``error``."""
        ...


class GivenUpError(Exception):
    """No time is left for another try."""


class Follower(threading.Thread):
    """A thread that delivers the journal to one sink until the run has ended.

    An entry is delivered once the sink has accepted it. A failed call is retried after growing pauses.

    Attributes:
        sink: receives the journal.
        error: why the sink currently lacks something; None if it has everything.
    """

    def __init__(self, run_dir: Path, sink: Sink, interval: float) -> None:
        """``interval``: seconds between two reads of the journal."""
        # A daemon thread: a sink that hangs in a call must not keep the process alive.
        super().__init__(name=f"follower of {type(sink).__name__}", daemon=True)
        self.sink = sink
        self.error: Exception | None = None
        self._journal, self._interval = JournalReader(run_dir), interval
        self._status: Status | None = None  # how the run ended
        self._deadlines = Deadlines()
        self._is_outage_reported = self._is_abandoned = False
        self._looks_wanted = self._looks_done = 0
        self._changed, self._is_over = threading.Condition(), threading.Event()

    def run(self) -> None:
        try:
            self._persist(self.sink.open)
            while not self._look():
                pass
            assert self._status
            self._persist(partial(self.sink.close, self._status))
        except GivenUpError as error:
            self._set_error(self.error or error)
        except Exception as error:
            self._fail(error)
        finally:
            self._is_over.set()

    def flush(self, timeout: float) -> None:
        """Wait until all present entries are delivered, the sink has failed, or ``timeout`` seconds have passed."""
        with self._changed:
            self._looks_wanted += 1
            wanted = self._looks_wanted
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._looks_done >= wanted or self.error, timeout)

    def finish(self, status: Status, answer_seconds: float, closing_seconds: float = CLOSING_SECONDS) -> None:
        """Deliver the rest and close the sink, within two deadlines.

        Args:
            status: how the run ended.
            answer_seconds: as for :meth:`Deadlines.run_ended`.
            closing_seconds: likewise.
        """
        with self._changed:
            self._deadlines.run_ended(answer_seconds, closing_seconds)
            self._status = status
            self._looks_wanted += 1
            self._changed.notify_all()
        # Not joined: if a signal raises in Thread.join, Python 3.11 marks the thread as ended.
        while not self._is_over.is_set() and (left := self._seconds_left()) > 0:
            self._is_over.wait(min(left, 0.2))  # the deadline moves
        with self._changed:
            if not self._is_over.is_set():
                self._is_abandoned = True
                self.error = self.error or GivenUpError("no answer in time")

    def _seconds_left(self) -> float:
        return self._deadlines.left(has_failed=self.error is not None)

    def _look(self) -> bool:
        """Wait for the next read of the journal and deliver new lines; True after the last read."""
        with self._changed:
            self._changed.wait_for(lambda: self._looks_wanted > self._looks_done, timeout=self._interval)
            wanted, is_last = self._looks_wanted, self._status is not None
        while entries := list(islice(self._journal.new_entries(), BATCH)):
            self._persist(partial(self.sink.write, entries))
        with self._changed:
            self._looks_done = wanted
            self._changed.notify_all()
        return is_last

    def _persist(self, action: Callable[[], None]) -> None:
        """Call ``action`` until it succeeds.

        Raises:
            GivenUpError: where no time is left.
            Exception: an error that further tries cannot fix.
        """

        def attempt() -> None:
            if self._is_abandoned or self._seconds_left() < 0:
                raise GivenUpError("there was no time left")
            action()

        retrying = Retrying(
            retry=retry_if_exception(self._is_retryable),
            wait=wait_exponential(multiplier=SHORTEST_PAUSE, max=LONGEST_PAUSE),
            before_sleep=self._report_failure,
            sleep=self._pause,
        )
        retrying(attempt)
        self._deadlines.answered()
        self._set_error(None)
        if self._is_outage_reported:
            self._is_outage_reported = False
            self._print("tracker reachable again, delivering what it missed")

    def _is_retryable(self, error: BaseException) -> bool:
        is_retryable = isinstance(error, Exception) and not isinstance(error, GivenUpError)
        return is_retryable and not self.sink.is_final(error)  # type: ignore[arg-type]

    def _report_failure(self, state: RetryCallState) -> None:
        """Note the error. The second failure is reported: a single one, such as a closed connection, usually passes."""
        assert state.outcome
        error = state.outcome.exception()
        assert isinstance(error, Exception)
        self._set_error(error)
        if state.attempt_number == 2 and not self._is_outage_reported:
            self._is_outage_reported = True
            problem = "the tracker has a bug" if is_bug(error) else "tracker unreachable"
            self._print(f"{problem}, training continues, retrying: {shortened_error(error)}")

    def _pause(self, seconds: float) -> None:
        """Wait before the next try; once the run has ended, the pause is the shortest one."""
        with self._changed:
            if self._status is None:
                self._changed.wait_for(lambda: self._status is not None, seconds)
                return
        time.sleep(SHORTEST_PAUSE)

    def _set_error(self, error: Exception | None) -> None:
        with self._changed:
            if not self._is_abandoned:
                self.error = error
                self._changed.notify_all()

    def _print(self, line: str) -> None:
        if not self._is_abandoned:  # else the message of `finish` says what to do
            print_notice(line)

    def _fail(self, error: Exception) -> None:
        """After a final error, deliver only how the run ended: the sink may still accept that."""
        self._print(f"{type(self.sink).__name__} failed, training continues: {shortened_error(error)}")
        self._set_error(error)
        with self._changed:
            self._changed.wait_for(lambda: self._status is not None)
        try:
            assert self._status
            self.sink.close(self._status)
        except Exception:  # the first error is the one to report
            return


def undelivered_message(error: Exception, folder: Path) -> str:
    """The message about a tracker that lacks something, with the command that delivers it."""
    path = folder / JOURNAL_FILE if (folder / JOURNAL_FILE).exists() else folder
    if is_bug(error):
        why, then = f"{bug_text(error)}\n", "Once that is fixed,"
    else:
        why, then = f"{shortened_error(error).rstrip('.')}. ", "Once the tracker can be reached,"
        if isinstance(error, TrackingError):  # its message has the remedy
            then = "Then"
        elif remedy := advice(error):
            then = f"{remedy}. Then"
    return f"the tracker did not get everything: {why}All points are in {path}. {then} run\n{sync_command(folder)}"
