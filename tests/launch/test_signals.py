"""Signals that reach every process of a run, arrive twice, or belong to the calling program."""

import multiprocessing
import multiprocessing.context
import signal
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.api import PContext

from cifar_exp.distributed.stop_requests import INTERRUPT_FILE
from cifar_exp.errors import Stopped
from cifar_exp.launch import forkserver, rank_processes
from cifar_exp.launch.rank_processes import ending_ranks_by_sigkill
from cifar_exp.launch.stopping import GracefulStop
from cifar_exp.system import host
from cifar_exp.system.signals import STOPPING, blocked_signals, is_repeated, other_handler

BLOCKED = "import signal; print(*sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))))"


def test_child_process_starts_with_signals_blocked_and_the_command_unblocks_them() -> None:
    """Between its start and its own handlers a signal would end it."""
    with blocked_signals():
        done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=True, timeout=60)
    assert set(map(int, done.stdout.split())) >= set(STOPPING)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(STOPPING)


def test_torch_ends_ranks_by_a_signal_that_they_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a restart takes 30 s."""
    sent: list[tuple[signal.Signals, int]] = []
    monkeypatch.setattr(PContext, "close", lambda _ranks, death_sig, timeout: sent.append((death_sig, timeout)))
    killed: list[Any] = []
    monkeypatch.setattr(BaseProcess, "kill", killed.append)
    ranks: Any = None
    with ending_ranks_by_sigkill():
        BaseProcess.terminate(ranks)
        assert killed == [ranks]
        PContext.close(ranks, signal.SIGTERM, 30)
        PContext.close(ranks)
    PContext.close(ranks, signal.SIGTERM, 5)
    assert sent == [(signal.SIGKILL, 30), (signal.SIGKILL, 30), (signal.SIGTERM, 5)]


def test_repeated_signal_within_a_second_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`timeout` sends it to the command and to the command's group."""
    killed: list[bool] = []
    monkeypatch.setattr(rank_processes, "kill_ranks", lambda: killed.append(True))
    received: list[GracefulStop] = []

    def train() -> None:
        with GracefulStop(tmp_path) as stopping:
            received.append(stopping)
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert (tmp_path / INTERRUPT_FILE).exists()
            assert not killed
            signal.raise_signal(signal.SIGUSR1)

    with pytest.raises(Stopped) as stopped:
        train()
    assert killed == [True]
    assert stopped.value is received[0].received
    assert stopped.value.exit_code == 143
    late = Stopped(signal.SIGTERM, received=stopped.value.received - 2)
    assert not is_repeated(late, signal.SIGTERM)


def test_outer_signal_handler_is_called_after_the_ranks_have_ended(tmp_path: Path) -> None:
    """Submitit's handler requeues the job, so the checkpoint must be saved before."""
    called: list[int] = []

    def requeue(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        called.append(number)
        sys.exit(3)

    def train() -> None:
        with GracefulStop(tmp_path):
            signal.raise_signal(signal.SIGUSR2)
            assert called == []

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        with pytest.raises(SystemExit):
            train()
        assert called == [signal.SIGUSR2]
        assert signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert other_handler(signal.SIG_DFL) is other_handler(signal.default_int_handler) is None


def test_start_method_added_by_a_library_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joblib's worker processes use the start method loky, which ranks do not have."""
    contexts: Any = multiprocessing.context
    added = type("LokyContext", (multiprocessing.context.SpawnContext,), {"_name": "loky"})()
    monkeypatch.setitem(contexts._concrete_contexts, "loky", added)
    before = multiprocessing.get_start_method(allow_none=True)
    try:
        multiprocessing.set_start_method("loky", force=True)
        forkserver._set_known_start_method()
        assert multiprocessing.get_start_method() == host.start_method()
    finally:
        multiprocessing.set_start_method(before, force=True)
