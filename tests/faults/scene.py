"""Where a fault is injected: a folder of its own, commands whose processes carry a mark, and what must hold after them.

After every command that ends, however it ends: no process of it is alive within ten seconds, nothing of it is left in
its temporary folder, and nothing in shared memory. At the end of a case no half-written file is left.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import psutil

from tests.conftest import environment
from tests.faults.injected import ANNOUNCED, PLAN
from tests.helpers.processes import answers_signals

MARK = "CIFAR_EXP_FAULT_SCENE"
OWN_MOUNTS = "CIFAR_EXP_FAULTS_OWN_MOUNTS"  # set where the suite has a mount namespace, and shared memory, of its own
ORPHAN_SECONDS = 10.0
SHARED = ("torch_", "sem.", "psm_", "mp-")  # what Python and torch name theirs; MLflow's server has others
KEPT_CACHE = "torchinductor_"  # torch's own cache, which it keeps for later runs
LIMIT = 600.0  # seconds, after which a command counts as hanging; generous, since other work may share the cores


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str
    seconds: float


class Running:
    """A command that was started in a scene, in a process group of its own, as a shell would."""

    def __init__(self, scene: "Scene", command: Sequence[str], env: Mapping[str, str], output: Path) -> None:
        self.scene, self.mark, self._tmp = scene, env[MARK], Path(env["TMPDIR"])
        self._before = {path.name for path in self._tmp.iterdir()}
        self._output, self._began = output, time.monotonic()
        with output.with_suffix(".out").open("wb") as out, output.with_suffix(".err").open("wb") as err:
            self.process = subprocess.Popen(
                command, cwd=scene.folder, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, process_group=0
            )

    @property
    def out(self) -> str:
        return self._output.with_suffix(".out").read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._output.with_suffix(".err").read_text(errors="replace")

    def until(self, condition: Callable[[], object], what: str, seconds: float = LIMIT) -> None:
        """Wait for something to happen while the command runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended ({self.process.returncode}) before {what}: {self.err[-2000:]}"
            assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s"
            time.sleep(0.005)

    def until_announced(self) -> None:
        """Wait until the planned point is reached."""
        self.until((self.scene.folder / ANNOUNCED).exists, "the planned point")

    def until_it_answers_signals(self) -> None:
        """Wait until the command has taken charge of them."""
        self.until(lambda: answers_signals(self.process.pid), "its answer to signals")

    def ranks(self) -> list[psutil.Process]:
        """The rank processes, in order: the children of the fork server, in the order of their birth."""
        nursery = self.nursery()
        return sorted(nursery.children(), key=lambda child: child.pid) if nursery else []

    def nursery(self) -> psutil.Process | None:
        try:
            children = psutil.Process(self.process.pid).children()
            return next((child for child in children if "forkserver" in " ".join(child.cmdline())), None)
        except psutil.Error:
            return None

    def helpers(self) -> list[psutil.Process]:
        """Every process of the command but itself."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def until_training(self, journal: Path, lines: int = 1) -> None:
        """Wait until ``journal`` has got so many more lines."""
        before = _line_count(journal)
        self.until(lambda: _line_count(journal) >= before + lines, "training")

    def signal(self, number: int, group: bool = False) -> None:
        """Send a signal to the parent, or, as Ctrl-C in a terminal does, to all of its process group."""
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def wait(self, seconds: float = LIMIT) -> Ended:
        """Its end, with nothing left behind; what only a next start can clear away after SIGKILL is left to that."""
        try:
            code = self.process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it hangs: no end within {seconds:.0f} s; {self.err[-2000:]}") from None
        ended = Ended(code, self.out, self.err, time.monotonic() - self._began)
        self.scene.check_processes(self.mark)
        if code != -signal.SIGKILL:
            self.scene.check_temporary(self._tmp, self._before, f"exit code {code}, stderr: {ended.err[-3000:]}")
        return ended


class Scene:
    """One case's folder and commands.

    Attributes:
        folder: the current folder of its commands.
        tmp: their TMPDIR.
        random: for moments and places; seeded by the suite's seed and the case's name.
        times: how often each fault of the case is to be tried.
        count: how often each fault was handled.
        next_start: what the start after each fault did.
    """

    def __init__(self, base: Path, suite: "Suite", name: str, times: int) -> None:
        self.suite, self.times = suite, times
        self.base, self.folder, self.tmp = base, base / "work", base / "tmp"
        for folder in (self.folder, self.tmp):
            folder.mkdir(parents=True)
        self.random = Random(f"{suite.seed} {name}")
        self.count: Counter[str] = Counter()
        self.next_start: dict[str, str] = {}
        self._commands: list[Running] = []
        self._shared = shared_memory()

    def start(
        self,
        *arguments: str,
        plan: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        module: str = "cifar_exp.cli.main",
        before: Sequence[str] = (),
        tmp: Path | None = None,
    ) -> Running:
        """Start a command of the package.

        Args:
            arguments: of the command.
            plan: what the injected network does, and where (``injected.py``).
            env: of the command, beside the usual.
            module: whose ``main`` is the command.
            before: a command that runs this one, as in ``prlimit ...``.
            tmp: TMPDIR, for commands that run beside others.
        """
        (self.folder / ANNOUNCED).unlink(missing_ok=True)
        mark = f"{self.base}:{len(self._commands)}"
        variables = {"TMPDIR": str(tmp or self.tmp), MARK: mark, PLAN: json.dumps(plan or {})}
        code = f"import sys; from {module} import main; sys.exit(main())"
        command = [*before, sys.executable, "-c", code, *arguments]
        output = self.base / f"command-{len(self._commands)}"
        running = Running(self, command, environment() | variables | (env or {}), output)
        self._commands.append(running)
        return running

    def run(self, *arguments: str, seconds: float = LIMIT, **how: Any) -> Ended:
        """Start a command and wait for its end."""
        return self.start(*arguments, **how).wait(seconds)

    def handled(self, fault: str, next_start: str) -> None:
        """Count a fault after which everything was as it should be."""
        self.count[fault] += 1
        self.next_start[fault] = next_start

    def journal(self, run_dir: str = "run") -> Path:
        return self.folder / run_dir / "metrics.jsonl"

    def check_processes(self, mark: str) -> None:
        """Nothing that carries the mark lives ten seconds later."""
        deadline = time.monotonic() + ORPHAN_SECONDS
        while alive := marked(mark):
            assert time.monotonic() < deadline, f"processes survive: {alive}"
            time.sleep(0.02)

    def check_temporary(self, tmp: Path, before: set[str], told: str) -> None:
        """Nothing new is left in a command's TMPDIR, nothing of ours from before it, and nothing in shared memory.

        Commands that run beside each other share that: it is looked at once the last one has ended. ``told`` says how
        the command ended.
        """
        names = sorted(path.name for path in tmp.iterdir())
        left = [name for name in names if name not in before or name.startswith("cifar-exp-")]
        left = [name for name in left if not name.startswith(KEPT_CACHE)]
        assert not left, f"left in TMPDIR: {left}; {told}"
        alone = all(command.process.poll() is not None for command in self._commands)
        if OWN_MOUNTS in os.environ and alone:  # else others have files there, too
            shared = sorted(shared_memory() - self._shared)
            assert not shared, f"left in shared memory: {shared}; {told}"

    def check_files(self) -> None:
        """No half-written file is left, wherever."""
        left = [str(path.relative_to(self.folder)) for path in self.folder.rglob("*.cifar-exp-tmp")]
        assert not left, f"half-written files are left: {left}"

    def close(self) -> None:
        """End whatever a failed case left running."""
        for running in self._commands:
            for pid in marked(running.mark):
                os.kill(pid, signal.SIGKILL)
            running.process.wait()


@dataclass
class Suite:
    """What all cases share.

    Attributes:
        base: folder for the scenes.
        seed: of every random choice.
        repeat: how often a racy fault is tried.
        examples: random configurations to try.
        damages: damaged checkpoints to try.
        jobs: runs of the long sweep.
        references: folders of uninterrupted runs by their settings.
    """

    base: Path
    seed: int
    repeat: int = 20
    examples: int = 10_000
    damages: int = 10_000
    jobs: int = 200

    def __post_init__(self) -> None:
        self.references: dict[tuple[str, ...], Path] = {}
        self.numbers = count()


def says(ended: Ended, code: int, *words: str, traceback: bool = False) -> None:
    """Check a command's exit code and message."""
    told = f"exit code {ended.code}, stderr: {ended.err[-3000:]}"
    assert ended.code == code, f"{told}, where {code} was to come; stdout: {ended.out[-500:]}"
    for word in words:
        assert word in ended.err, f"no {word!r} in: {told}"
    assert traceback or "Traceback" not in ended.err, told


def shared_memory() -> set[str]:
    """Names of what Python and torch keep there."""
    return {path.name for path in Path("/dev/shm").glob("*") if path.name.startswith(SHARED)}


def marked(mark: str) -> list[int]:
    """Processes that were born with the mark in their environment; the dead that nobody has buried are none."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # another user's, or gone
                continue
    return found


def _line_count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
