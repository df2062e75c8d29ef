"""The cost of MLflow tracking: the real command with every step logged, while its parent is suspended in turns.

The parent process sends the run's journal to MLflow. Ranks do not depend on it and continue to train while it is
suspended. So blocks of steps with and without tracking alternate within one run; the difference between two runs would
be far larger than the cost. The figures are upper bounds: they include the display, and the work that the parent
catches up on after it was suspended.

MLflow's store is SQLite, a server that accepts connections and never answers, or an address at which nothing listens.
The last two end in exit code 5 after training: the journal has everything, MLflow nothing.

The recipe is the reference on one rank with all cores. Measuring begins some steps after the import of MLflow. The CPU
time of the parent until then (start-up, import) is a separate figure.
"""

import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil
from commands import Workplace, finish, synthetic_data, workplace
from harness import Figure, Goal, LoadMeter, arguments, publish
from workload import BATCH

from cifar_exp.errors import TrackingError
from cifar_exp.records import journal

BLOCK = 5  # steps that the parent is stopped, or runs; the first of them is not measured
FIRST = 12  # steps: MLflow is imported by then


def main() -> None:
    options = arguments(__doc__, pairs=12).parse_args()
    failed, at_most_1_percent = TrackingError.exit_code, Goal("<=", 1.01)
    rows, notes = [], {}
    with workplace() as place, silent_port() as hanging:
        settings = [
            *synthetic_data(place.folder, (FIRST + 2 * BLOCK * options.pairs + 1) * BATCH),
            "devices=cpu",
            "train.epochs=1",
            "train.log_every=1",
        ]
        for name, override, exit_code, goal in (
            ("no tracking", "tracking=none", 0, None),
            ("MLflow", "tracking=mlflow", 0, Goal("<=", 1.005)),
            ("a server that hangs", f"tracking.uri=http://127.0.0.1:{hanging}", failed, at_most_1_percent),
            ("no server", f"tracking.uri=http://127.0.0.1:{closed_port()}", failed, at_most_1_percent),
        ):
            found = measured(place, [*settings, override], exit_code, options.pairs)
            ratios = [a / b for a, b in zip(found.with_parent, found.parent_suspended, strict=True)]
            rows += [
                Figure.of(f"{name}: step, parent running / stopped", ratios, "", found.other_load, goal),
                Figure.of(f"{name}: parent's CPU time meanwhile", found.parent_cpu_share, "of 1 core"),
            ]
            notes[name] = (
                f"{median(found.with_parent):.3f} / {median(found.parent_suspended):.3f} s a step; "
                f"parent's CPU time before: {found.start_seconds:.1f} s"
            )
    publish("tracking", rows, notes)


@dataclass
class Measured:
    """One command.

    Attributes:
        start_seconds: CPU seconds that the parent took until measuring began.
        other_load: share of all cores that other processes took meanwhile.
        with_parent: seconds per step while the parent runs, for each block of steps.
        parent_suspended: seconds per step while it is suspended.
        parent_cpu_share: the parent's CPU seconds per second, for each block in which it runs.
    """

    start_seconds: float
    other_load: float
    with_parent: list[float]
    parent_suspended: list[float]
    parent_cpu_share: list[float]


def measured(place: Workplace, overrides: Sequence[str], exit_code: int, pairs: int) -> Measured:
    """Run a command whose parent runs and is suspended in blocks of steps, in the order A B B A."""
    process, run_dir = place.start(overrides)
    steps = Steps(process, run_dir)
    bounds, shares = [steps.wait_for(FIRST)], []
    start_seconds, meter = cpu_seconds(process), LoadMeter()
    running = [number % 4 in (0, 3) for number in range(2 * pairs)]
    try:
        for runs in running:
            process.send_signal(signal.SIGCONT if runs else signal.SIGSTOP)
            spent, began = cpu_seconds(process), time.monotonic()
            bounds.append(steps.wait_for(bounds[-1] + BLOCK))
            if runs:
                shares.append((cpu_seconds(process) - spent) / (time.monotonic() - began))
    finally:
        process.send_signal(signal.SIGCONT)
    load = meter.other_load()
    finish(process, exit_code)
    times = {entry.step: entry.time for entry in journal.read(run_dir)}
    seconds = [(times[end] - times[begin + 1]) / (end - begin - 1) for begin, end in pairwise(bounds)]
    with_parent, parent_suspended = (
        [second for second, ran in zip(seconds, running, strict=True) if ran is on] for on in (True, False)
    )
    return Measured(start_seconds, load, with_parent, parent_suspended, shares)


class Steps:
    """The progress of a running command, by its journal."""

    def __init__(self, process: "subprocess.Popen[str]", run_dir: Path) -> None:
        self._process, self._journal, self._step = process, journal.JournalReader(run_dir), 0

    def wait_for(self, step: int) -> int:
        """Wait until the step is logged; the last one that is."""
        while self._step < step:
            if self._process.poll() is not None:
                finish(self._process)
                raise RuntimeError(f"{self._process.args} ended before step {step}")
            self._step = max([self._step, *(entry.step for entry in self._journal.new_entries())])
            time.sleep(0.02)
        return self._step


def cpu_seconds(process: "subprocess.Popen[str]") -> float:
    """CPU seconds of the process so far, without its children."""
    spent = psutil.Process(process.pid).cpu_times()
    return spent.user + spent.system


@contextmanager
def silent_port() -> Iterator[int]:
    """A local port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as server:
        yield server.getsockname()[1]


def closed_port() -> int:
    """A local port at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


if __name__ == "__main__":
    main()
