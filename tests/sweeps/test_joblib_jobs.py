"""A signal to a sweep with parallel jobs in joblib's worker processes: the jobs save before they are killed."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar_exp.errors import Stopped
from cifar_exp.records.run_folder import LOCK_FILE, lock_run_folder
from cifar_exp.sweeps import joblib_jobs
from cifar_exp.sweeps.joblib_jobs import saving_jobs
from cifar_exp.system.locks import is_free
from cifar_exp.system.signals import STOPPING


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stopped_by(number: int, sweep_dir: Path) -> Stopped:
    with pytest.raises(Stopped) as stopped, saving_jobs(sweep_dir):
        signal.raise_signal(number)
    return stopped.value


def test_a_signal_is_passed_on_and_the_jobs_folders_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("", "0", "1"):
        (tmp_path / name).mkdir(exist_ok=True)
    sweep, running, ended = (lock_run_folder(tmp_path / name) for name in ("", "0", "1"))
    ended.release()
    sent: list[tuple[int, int]] = []

    def save(worker: int, number: int) -> None:
        assert not is_free(tmp_path / "0" / LOCK_FILE)
        sent.append((worker, number))
        signal.raise_signal(number)  # again, as `timeout` does
        if worker == 12:
            running.release()

    monkeypatch.setattr(joblib_jobs, "_workers", lambda: [11, 12])
    monkeypatch.setattr(joblib_jobs.os, "kill", save)
    monkeypatch.setattr(joblib_jobs, "SAVING_SECONDS", 1e6)
    assert stopped_by(signal.SIGTERM, tmp_path).exit_code == 143
    assert sent == [(11, signal.SIGTERM), (12, signal.SIGTERM)]
    sweep.release()


def test_jobs_of_other_launchers_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0").mkdir()
    monkeypatch.setattr(joblib_jobs, "SAVING_SECONDS", 1e6)
    with lock_run_folder(tmp_path / "0"):
        assert stopped_by(signal.SIGUSR1, tmp_path).exit_code == 138
