"""Commands under way: wait for them, find their ranks, see that nothing of them is left."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

Start = Callable[..., "subprocess.Popen[str]"]


def training_ranks(process: "subprocess.Popen[str]", workplace: Path) -> list[psutil.Process]:
    """The rank processes, in order, once training has begun."""
    wait_for(lambda: any(path.stat().st_size for path in workplace.rglob("metrics.jsonl")), process)
    (nursery,) = (c for c in psutil.Process(process.pid).children() if "multiprocessing.forkserver" in str(c.cmdline()))
    return sorted(nursery.children(), key=lambda child: child.pid)  # forked in the order of their ranks


def wait_for(condition: Callable[[], object], process: "subprocess.Popen[str]", seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def assert_nothing_is_left(processes: list[psutil.Process]) -> None:
    """Gone, or dead and waiting for the init process to notice."""
    _, alive = psutil.wait_procs(processes, timeout=2)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
