"""Followers whose sink fails, hangs and recovers. The sinks are fakes, so the tests are quick."""

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cifar_exp.errors import Stopped, TrackingError
from cifar_exp.records.journal import Entry, JournalWriter
from cifar_exp.records.run_folder import (
    UNDELIVERED_FILE,
    Outcome,
    Status,
    is_undelivered,
    mark_delivered,
    mark_undelivered,
)
from cifar_exp.tracking import deadlines, follower
from cifar_exp.tracking.follower import Follower
from cifar_exp.tracking.recorder import Recording


class Unreliable:
    """A sink that raises the error that ``error_of`` returns, if any."""

    def __init__(self, error_of: Callable[[str], Exception | None]) -> None:
        self._error_of = error_of
        self.received: list[Entry] = []
        self.sizes: list[int] = []
        self.closed: list[str] = []
        self.calls = 0

    def _call(self, name: str) -> None:
        self.calls += 1
        if error := self._error_of(name):
            raise error

    def open(self) -> None:
        self._call("open")

    def write(self, entries: Sequence[Entry]) -> None:
        self._call("write")
        self.sizes.append(len(entries))
        self.received += entries

    def close(self, status: Status) -> None:
        self._call("close")
        self.closed.append(status)

    def is_final(self, error: Exception) -> bool:
        return isinstance(error, sqlite3.DatabaseError)


def journal(run_dir: Path, count: int) -> list[Entry]:
    entries = [Entry(step, 1, step / 10, {"loss": 1 / step}) for step in range(1, count + 1)]
    writer = JournalWriter(run_dir)
    for entry in entries:
        writer.write(entry)
    writer.close()
    return entries


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "SHORTEST_PAUSE", 0.01)
    monkeypatch.setattr(deadlines, "REFUSED_SECONDS", 0.3)


def test_refused_entries_are_delivered_once_and_each_outage_is_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = journal(tmp_path, 1200)
    calls = iter(range(10**6))
    sink = Unreliable(lambda _: ConnectionError("http://me:pw@host is away") if next(calls) % 7 < 4 else None)
    follower = Follower(tmp_path, sink, interval=0.01)
    follower.start()
    follower.flush(timeout=60)
    follower.finish("FINISHED", answer_seconds=60)
    assert follower.error is None
    assert sink.received == entries
    assert sink.sizes == [500, 500, 200]  # at most 500 at once
    assert sink.closed == ["FINISHED"]
    messages = capsys.readouterr().err.splitlines()
    assert messages[0] == "cifar-exp: tracker unreachable, training continues, retrying: http://host is away"
    assert messages[1] == "cifar-exp: tracker reachable again, delivering what it missed"
    assert messages == messages[:2] * (len(messages) // 2)


def test_single_failure_is_retried_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal(tmp_path, 3)
    failures = [ConnectionError("closed")]
    sink = Unreliable(lambda name: failures.pop() if name == "write" and failures else None)
    follower = Follower(tmp_path, sink, interval=0.01)
    follower.start()
    follower.finish("FINISHED", answer_seconds=60)
    assert (follower.error, len(sink.received)) == (None, 3)
    assert capsys.readouterr().err == ""


def test_hung_sink_delays_neither_training_nor_the_end(tmp_path: Path) -> None:
    journal(tmp_path, 3)
    answer = threading.Event()
    sink = Unreliable(lambda name: None if name != "write" else answer.wait() and None)
    follower = Follower(tmp_path, sink, interval=0.01)
    follower.start()
    began = time.monotonic()
    follower.flush(timeout=0.3)
    follower.finish("FINISHED", answer_seconds=0.5)
    assert time.monotonic() - began < 10
    assert "no answer" in str(follower.error)
    answer.set()
    follower.join(10)
    assert sink.closed == []  # the user knows that nothing was delivered, so nothing is sent later
    assert "no answer" in str(follower.error)


@pytest.mark.parametrize("hangs", ["open", "write"])
def test_stopped_run_waits_for_a_hung_sink_for_a_limited_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: str
) -> None:
    monkeypatch.setattr(deadlines, "CLOSING_SECONDS", 10_000.0)  # for a run that was not stopped
    monkeypatch.setattr(deadlines, "STOPPED_SECONDS", 0.3)
    monkeypatch.setattr(deadlines, "LEAST_SECONDS", 0.1)
    answer = threading.Event()
    sink = Unreliable(lambda name: None if name != hangs else answer.wait() and None)

    def stopped() -> None:
        with Recording(tmp_path, time.monotonic(), sink) as closing:
            closing.start(Unreliable(lambda _: None))
            journal(tmp_path, 3)
            raise Stopped(signal.SIGINT)

    with pytest.raises(Stopped):
        stopped()
    assert (tmp_path / UNDELIVERED_FILE).exists()
    answer.set()


def test_slow_page_does_not_shorten_the_trackers_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(deadlines, "LEAST_SECONDS", 0.01)
    page = Unreliable(lambda name: time.sleep(1.5) if name == "close" else None)
    tracker = Unreliable(lambda name: time.sleep(0.3) if name == "close" else None)
    with Recording(tmp_path, time.monotonic(), tracker) as closing:
        closing.start(page)
        journal(tmp_path, 3)
    assert tracker.closed == ["FINISHED"]
    assert not is_undelivered(tmp_path)


def test_undelivered_file_is_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty note, which a kill during the write would leave, would count as delivered to any store."""

    def interrupted(_self: Path, _target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mark_undelivered(tmp_path, "a server")
    assert list(tmp_path.iterdir()) == []
    mark_undelivered(tmp_path, "a server")
    assert mark_delivered(tmp_path, "another") == "a server"


def test_undelivered_store_is_cleared_only_by_a_delivery_to_it(tmp_path: Path) -> None:
    mark_undelivered(tmp_path, "a server")
    mark_undelivered(tmp_path, "another")  # the run resumes with another store; the first still lacks points
    assert mark_delivered(tmp_path, "another") == "a server"
    assert is_undelivered(tmp_path)
    assert mark_delivered(tmp_path, "a server") == ""
    assert not is_undelivered(tmp_path)
    assert mark_delivered(tmp_path, "a server") == ""
    (tmp_path / UNDELIVERED_FILE).touch()  # an earlier version did not name the store
    assert mark_delivered(tmp_path, "a server") == ""
    assert not is_undelivered(tmp_path)


def test_final_error_is_not_retried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal(tmp_path, 3)
    sink = Unreliable(lambda name: sqlite3.DatabaseError("file is not a database") if name == "open" else None)
    follower = Follower(tmp_path, sink, interval=0.01)
    follower.start()
    follower.finish("FINISHED", answer_seconds=60)
    assert sink.calls == 2  # open and close
    assert isinstance(follower.error, sqlite3.DatabaseError)
    assert "Unreliable failed, training continues: file is not a database" in capsys.readouterr().err


def test_undelivered_run_prints_the_sync_command(tmp_path: Path) -> None:
    sink = Unreliable(lambda _: ConnectionError("refused"))
    display = Unreliable(lambda _: None)
    record = Recording(tmp_path, time.monotonic() - 100, sink)
    began = time.monotonic()

    def train() -> None:
        with record:
            record.start(display)
            for follower in record._followers:
                follower._deadlines._began -= 100  # as if it had been unreachable for long
            journal(tmp_path, 3)

    with pytest.raises(TrackingError) as caught:
        train()
    assert time.monotonic() - began < 20
    assert str(caught.value).splitlines()[-1].endswith(f"cifar-exp sync {os.path.relpath(tmp_path)}")
    assert display.closed == ["FINISHED"]
    assert len(display.received) == 4  # three and the last line
    outcome = Outcome.of(tmp_path)
    assert outcome is not None
    assert outcome.status == "FINISHED"


def test_signal_while_a_run_is_closed_is_raised_afterwards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(_number: int, _frame: object) -> None:
        raise Stopped(signal.SIGINT)

    def strike(call: str) -> None:
        if call == "close":
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.5)

    sink, display = Unreliable(strike), Unreliable(lambda _: None)
    record = Recording(tmp_path, time.monotonic(), sink)

    def train() -> None:
        with record:
            record.start(display)
            journal(tmp_path, 3)

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with pytest.raises(Stopped):
            train()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert display.closed == sink.closed == ["FINISHED"]
    assert len(sink.received) == 4  # three and the last line
    outcome = Outcome.of(tmp_path)
    assert outcome
    assert outcome.status == "FINISHED"
    assert capsys.readouterr().err == "cifar-exp: the run is being closed\n"


def test_outcome_of_a_run_is_written_to_its_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Recording(tmp_path, time.monotonic(), None):
        raise RuntimeError
    failed = Outcome.of(tmp_path)
    assert failed is not None
    assert failed.status == "FAILED"
    going_on = Recording(tmp_path, time.monotonic(), None).__enter__()
    assert Outcome.of(tmp_path) is None
    with pytest.raises(KeyboardInterrupt), going_on:
        raise KeyboardInterrupt
    stopped = Outcome.of(tmp_path)
    assert stopped is not None
    assert stopped.status == "KILLED"
