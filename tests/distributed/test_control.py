"""All ranks stop at the same step, whichever notices the request first; a hung rank is killed and named."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cifar_exp.distributed.rank_control import RankControl
from cifar_exp.distributed.stop_requests import INTERRUPT_FILE, STOP_FILE, Request, StopPoint, ended_by
from cifar_exp.launch.watchdog import Watchdog


def test_stop_request_takes_effect_on_all_ranks_at_the_same_step(tmp_path: Path) -> None:
    first, second = (RankControl(tmp_path, tmp_path, rank) for rank in (0, 1))
    (tmp_path / INTERRUPT_FILE).touch()
    second.approach(StopPoint(1))  # only the first one looks
    assert second.agreed(StopPoint(1)) is None
    first.approach(StopPoint(2))
    assert [rank.agreed(StopPoint(1, in_evaluation=True)) for rank in (first, second)] == [None, None]
    request = Request("interrupt", "a signal")
    assert [rank.agreed(StopPoint(2)) for rank in (first, second)] == [request, request]
    first.approach(StopPoint(3))  # what was agreed stays
    assert second.agreed(StopPoint(2, in_evaluation=True)) == ended_by(tmp_path) == request


def test_stop_in_an_evaluation_is_ordered_between_two_steps(tmp_path: Path) -> None:
    first, second = (RankControl(tmp_path, tmp_path, rank) for rank in (0, 1))
    (tmp_path / INTERRUPT_FILE).touch()
    first.approach(StopPoint(5, in_evaluation=True))
    assert second.agreed(StopPoint(5)) is None
    assert second.agreed(StopPoint(5, in_evaluation=True)) == second.agreed(StopPoint(6)) == ended_by(tmp_path)
    points = [StopPoint(step, in_evaluation) for in_evaluation in (True, False) for step in (1, 0)]
    assert [tuple(point) for point in sorted(points)] == [(0, False), (0, True), (1, False), (1, True)]


def test_stop_file_is_removed_when_read(tmp_path: Path) -> None:
    ipc_dir, run_dir = tmp_path / "ipc_dir", tmp_path / "run"
    ipc_dir.mkdir()
    run_dir.mkdir()
    control = RankControl(ipc_dir, run_dir)
    control.approach(StopPoint(1))
    assert control.agreed(StopPoint(1)) is None
    (run_dir / STOP_FILE).touch()
    control.approach(StopPoint(2))
    assert control.agreed(StopPoint(2)) == Request("stop", "the file stop in the run's folder")
    assert not (run_dir / STOP_FILE).exists()


def test_folder_named_stop_is_ignored(tmp_path: Path) -> None:
    ipc_dir, run_dir = tmp_path / "ipc_dir", tmp_path / "run"
    ipc_dir.mkdir()
    (run_dir / STOP_FILE).mkdir(parents=True)
    control = RankControl(ipc_dir, run_dir)
    control.approach(StopPoint(1))
    assert control.agreed(StopPoint(1)) is None
    assert (run_dir / STOP_FILE).is_dir()


def test_max_seconds_ends_training_at_the_next_step(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    over, endless = RankControl(tmp_path / "a", seconds=0.0), RankControl(tmp_path / "b", seconds=86400.0)
    for control in (over, endless):
        control.approach(StopPoint(1))
    assert over.agreed(StopPoint(1)) == Request(
        "stop", "train.max_seconds is over; it counts from the start of the command"
    )
    assert endless.agreed(StopPoint(1)) is None


EVALUATE = "control.approach(StopPoint(9, in_evaluation=True))"


def rank_process(ipc_dir: Path, rank: int, steps: int, then: str = "") -> "subprocess.Popen[bytes]":
    """A rank that trains ``steps`` steps, begins another one and hangs."""
    code = (
        "import time; from pathlib import Path; from cifar_exp.distributed.rank_control import RankControl, StopPoint\n"
        f"control = RankControl(Path({str(ipc_dir)!r}), rank={rank})\n"
        f"for step in range({steps} + 1): control.approach(StopPoint(step + 1))\n"
        f"{then}\n"
        "time.sleep(600)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code])


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("stopped", [None, 0])
def test_hung_rank_is_the_stopped_one_or_the_one_at_the_lowest_stage(tmp_path: Path, stopped: int | None) -> None:
    ranks = [rank_process(tmp_path, rank, steps) for rank, steps in enumerate((9, 4))]
    blamed = 1 if stopped is None else stopped
    try:
        watchdog = Watchdog(tmp_path, 2, timeout=2.0)
        until(lambda: {beat.point.step for beat in watchdog._beats().values()} == {10, 5})
        if stopped is not None:
            ranks[stopped].send_signal(signal.SIGSTOP)
        with watchdog:
            assert ranks[blamed].wait(60) == -signal.SIGKILL
        assert ranks[1 - blamed].poll() is None
        assert list(watchdog.hung) == [blamed]
        assert (
            f"rank {blamed} hung after step {(9, 4)[blamed]} (no heartbeat for launcher.timeout=2 s"
            in watchdog.hung[blamed]
        )
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize(
    ("first", "second", "blamed"),
    [
        ("control.next_stage()", "", [1]),  # the first waits for the second's gradients
        (f"for _ in range(5): {EVALUATE}", f"{EVALUATE}; control.next_stage()", [0]),  # its shard is larger
        ("", "", [0, 1]),
    ],
)
def test_rank_waiting_in_a_collective_is_not_reported_as_hung(
    tmp_path: Path, first: str, second: str, blamed: list[int]
) -> None:
    """Both are in their tenth step, or in the evaluation after the ninth."""
    ranks = [rank_process(tmp_path, rank, 9, then) for rank, then in enumerate((first, second))]
    try:
        watchdog = Watchdog(tmp_path, 2, timeout=2.0)
        until(lambda: len(watchdog._beats()) == 2)
        with watchdog:
            for rank in blamed:
                assert ranks[rank].wait(60) == -signal.SIGKILL
        assert list(watchdog.hung) == blamed
        who = "ranks 0 and 1" if len(blamed) == 2 else f"rank {blamed[0]}"
        assert watchdog.hung[blamed[0]].startswith(f"{who} hung after step 9 (no heartbeat")
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def test_ranks_whose_folder_was_removed_are_ended_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clean-up of TMPDIR removes the heartbeats: hung ranks would never be killed."""
    folder, ended = tmp_path / "shared", list[object]()
    folder.mkdir()
    monkeypatch.setattr("cifar_exp.launch.rank_processes.kill_ranks", lambda: ended.append("ranks"))
    before = signal.signal(signal.SIGQUIT, lambda number, _: ended.append(number))
    try:
        with Watchdog(folder, 1, timeout=1.0):
            folder.rmdir()
            until(lambda: len(ended) == 2)
    finally:
        signal.signal(signal.SIGQUIT, before)
    assert ended == ["ranks", signal.SIGQUIT]
