"""Running commands: wait for them, find their ranks, check that no process is left."""

import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import psutil

from tests.helpers.commands import ForkedCommand

Start = Callable[..., ForkedCommand]


def answers_signals(pid: int) -> bool:
    """Whether the command has installed its SIGTERM handler. Python has none by default."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(line for line in status if line.startswith("SigCgt"))
    return bool(int(mask.split()[1], 16) & 1 << signal.SIGTERM - 1)


def training_ranks(process: ForkedCommand, workplace: Path) -> list[psutil.Process]:
    """The rank processes, in order, once training has begun."""
    wait_for(lambda: any(path.stat().st_size for path in workplace.rglob("metrics.jsonl")), process)
    children = psutil.Process(process.pid).children()
    (fork_server,) = (child for child in children if "multiprocessing.forkserver" in str(child.cmdline()))
    return sorted(fork_server.children(), key=lambda child: child.pid)  # forked in the order of their ranks


def wait_for_tracked_runs(process: ForkedCommand, store: Path, count: int) -> None:
    """Wait until the SQLite ``store`` has ``count`` runs: MLflow may open one long after training has begun."""

    def opened() -> bool:
        with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as database:
            return database.execute("SELECT COUNT(*) FROM runs").fetchone() == (count,)

    wait_for(opened, process)


def wait_for(condition: Callable[[], object], process: ForkedCommand, seconds: float = 120) -> None:
    """Poll until the condition holds, using at most half of the CPU time, since other tests need it."""
    deadline = time.monotonic() + seconds
    while True:
        asked = time.monotonic()
        if condition():
            return
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(max(0.05, time.monotonic() - asked))


def to_every_process(process: ForkedCommand, number: int) -> None:
    """Send a signal to all processes of a command, as a scheduler does: ranks first, twice to the command."""
    command = psutil.Process(process.pid)
    for member in (*reversed(command.children(recursive=True)), command, command):
        with suppress(psutil.NoSuchProcess):
            member.send_signal(number)


def assert_nothing_is_left(processes: list[psutil.Process]) -> None:
    """Every process has exited, or is a zombie."""
    _, alive = psutil.wait_procs(processes, timeout=2)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
