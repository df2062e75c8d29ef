"""Run the real command `cifar-exp` in a temporary folder."""

import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cifar_exp.records import journal

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: the run folder.
        metrics: the last value of each metric in the journal.
    """

    folder: Path
    metrics: dict[str, float]


@dataclass
class Workplace:
    """A folder in which commands run. It has MLflow's store and all run folders.

    Attributes:
        folder: its path.
        runs: the number of runs started so far.
    """

    folder: Path
    runs: int = 0

    def run(self, overrides: Sequence[str]) -> Run:
        """``cifar-exp`` with ``overrides``, to its end."""
        process, run_dir = self.start(overrides)
        finish(process)
        return Run(run_dir, journal.last_values(run_dir))

    def start(self, overrides: Sequence[str], progress: str = "quiet") -> tuple["subprocess.Popen[str]", Path]:
        """The running command and its run's folder."""
        self.runs += 1
        run_dir = self.folder / "runs" / str(self.runs)
        command = [sys.executable, "-m", "cifar_exp", *overrides, f"progress={progress}", f"hydra.run.dir={run_dir}"]
        return self.popen(command), run_dir

    def popen(self, command: Sequence[str]) -> "subprocess.Popen[str]":
        """``command`` in this folder; what it prints is kept for the case that it fails."""
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def seconds_until(self, command: Callable[[], "subprocess.Popen[str]"], reached: Callable[[], bool]) -> float:
        """Seconds from the start of a command until ``reached``. The rest of the command is not measured."""
        began = time.perf_counter()
        process = command()
        while not reached():
            if process.poll() is not None and not reached():
                finish(process)
                raise RuntimeError(f"{process.args} ended before it was where it should be")
            time.sleep(0.005)
        seconds = time.perf_counter() - began
        finish(process)
        return seconds


@contextmanager
def workplace() -> Iterator[Workplace]:
    """A fresh one, removed at the end."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory(prefix="cifar-exp-benchmark-") as folder:
        yield Workplace(Path(folder))


def synthetic_data(folder: Path, train_count: int, test_count: int = 500) -> list[str]:
    """Overrides for training on a few synthetic images. The first run generates them in ``folder``."""
    counts = [f"data.train_count={train_count}", f"data.test_count={test_count}"]
    return ["data=synthetic", f"data.root={folder / 'synthetic'}", *counts]


def finish(process: "subprocess.Popen[str]", exit_code: int = 0) -> None:
    """Wait for a command's end.

    Raises:
        RuntimeError: it did not end with ``exit_code``, with what it printed.
    """
    output, _ = process.communicate()
    with suppress(ChildProcessError):  # orphans of the command: else their CPU seconds would count as other load
        while True:
            os.waitpid(-1, 0)
    if process.returncode != exit_code:
        raise RuntimeError(f"{process.args} ended with {process.returncode}:\n{output}")
