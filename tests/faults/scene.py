"""A scene: the folder in which a case injects faults, its commands, and checks of what they leave behind.

After every command, whatever its exit code: none of its processes lives longer than ten seconds, and nothing is left in
its temporary folder and in shared memory. After every case: no half-written file is left.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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
OWN_MOUNTS = "CIFAR_EXP_FAULTS_OWN_MOUNTS"  # set if the suite has its own mount namespace and /dev/shm
ORPHAN_SECONDS = 10.0
SHARED = ("torch_", "sem.", "psm_", "mp-")  # prefixes of Python and torch; MLflow's server has others
KEPT_CACHE = "torchinductor_"  # torch's cache, which later runs use
LIMIT = 600.0  # seconds until a command counts as hung; generous, because other processes may use the cores


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str
    seconds: float


class Running:
    """A command that was started in a scene. It has its own process group, as in a shell."""

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
        """Wait for ``condition`` while the command runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended ({self.process.returncode}) before {what}: {self.err[-2000:]}"
            assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s"
            time.sleep(0.005)

    def until_announced(self) -> None:
        """Wait until the planned point is reached."""
        self.until((self.scene.folder / ANNOUNCED).exists, "the planned point")

    def until_it_answers_signals(self) -> None:
        """Wait until the command handles signals."""
        self.until(lambda: answers_signals(self.process.pid), "its signal handlers")

    def ranks(self) -> list[psutil.Process]:
        """The rank processes by rank: the children of the fork server by pid."""
        fork_server = self.fork_server()
        return sorted(fork_server.children(), key=lambda child: child.pid) if fork_server else []

    def fork_server(self) -> psutil.Process | None:
        try:
            children = psutil.Process(self.process.pid).children()
            return next((child for child in children if "forkserver" in " ".join(child.cmdline())), None)
        except psutil.Error:
            return None

    def helpers(self) -> list[psutil.Process]:
        """All descendants of the command's process."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def until_training(self, journal: Path, lines: int = 1) -> None:
        """Wait until ``journal`` has ``lines`` more lines."""
        before = _line_count(journal)
        self.until(lambda: _line_count(journal) >= before + lines, "training")

    def signal(self, number: int, group: bool = False) -> None:
        """Send a signal to the parent or, like Ctrl-C in a terminal, to its process group."""
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def wait(self, seconds: float = LIMIT) -> Ended:
        """Wait for the end and check for leftovers. After SIGKILL temporary files may stay for the next start."""
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
    """The folder and the commands of one case.

    Attributes:
        folder: the current folder of its commands.
        tmp: their TMPDIR.
        random: for random moments and bytes; its seed is made of the suite's seed and the case's name.
        times: how often to try each fault of the case.
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
            plan: the fault that the injected network has (``injected.py``).
            env: additional environment variables.
            module: whose ``main`` is the command.
            before: a prefix, such as ``prlimit ...``.
            tmp: TMPDIR, for commands that run at the same time as others.
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
        """Count a fault that was handled."""
        self.count[fault] += 1
        self.next_start[fault] = next_start

    def journal(self, run_dir: str = "run") -> Path:
        return self.folder / run_dir / "metrics.jsonl"

    def check_processes(self, mark: str) -> None:
        """Check that the command's processes end within ten seconds."""
        deadline = time.monotonic() + ORPHAN_SECONDS
        while alive := marked(mark):
            assert time.monotonic() < deadline, f"processes survive: {[_described(pid) for pid in alive]}"
            time.sleep(0.02)

    def check_temporary(self, tmp: Path, before: set[str], how_it_ended: str) -> None:
        """Check that the command left nothing in its TMPDIR, no folders of the package there, and no shared memory.

        Shared memory is checked after the last of several simultaneous commands. ``how_it_ended`` is for the message.
        """
        names = sorted(path.name for path in tmp.iterdir())
        left = [name for name in names if name not in before or name.startswith("cifar-exp-")]
        left = [name for name in left if not name.startswith(KEPT_CACHE)]
        assert not left, f"left in TMPDIR: {left}; {how_it_ended}"
        alone = all(command.process.poll() is not None for command in self._commands)
        if OWN_MOUNTS in os.environ and alone:  # otherwise other processes have files there, too
            shared = sorted(shared_memory() - self._shared)
            assert not shared, f"left in shared memory: {shared}; {how_it_ended}"

    def check_files(self) -> None:
        """Check that no half-written file is left in any folder."""
        left = [str(path.relative_to(self.folder)) for path in self.folder.rglob("*.cifar-exp-tmp")]
        assert not left, f"half-written files are left: {left}"

    def close(self) -> None:
        """Kill the processes that a failed case left."""
        for running in self._commands:
            for pid in marked(running.mark):
                os.kill(pid, signal.SIGKILL)
            running.process.wait()


@dataclass
class Suite:
    """Parameters and uninterrupted runs that all cases share.

    Attributes:
        base: folder for the scenes.
        seed: of every random choice.
        repeat: how often to try a racy fault.
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


def check_exit(ended: Ended, code: int, *words: str, traceback: bool = False) -> None:
    """Check a command's exit code and message."""
    how_it_ended = f"exit code {ended.code}, stderr: {ended.err[-3000:]}"
    assert ended.code == code, f"{how_it_ended}, expected {code}; stdout: {ended.out[-500:]}"
    for word in words:
        assert word in ended.err, f"no {word!r} in: {how_it_ended}"
    assert traceback or "Traceback" not in ended.err, how_it_ended


def shared_memory() -> set[str]:
    """Names of the shared memory files of Python and torch."""
    return {path.name for path in Path("/dev/shm").glob("*") if path.name.startswith(SHARED)}


def marked(mark: str) -> list[int]:
    """Pids of processes with the mark in their environment, without zombies."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # another user's process, or it has ended
                continue
    return found


def _described(pid: int) -> str:
    """A process for a message: its parent, state, age in seconds, kernel wait, and command."""
    with suppress(psutil.Error, OSError):
        process = psutil.Process(pid)
        age = time.time() - process.create_time()
        where = Path(f"/proc/{pid}/wchan").read_text()
        command = " ".join(process.cmdline())[-120:]
        return f"{pid} (parent {process.ppid()}, {process.status()}, {age:.0f} s, {where}): {command}"
    return f"{pid}: it has ended"


def _line_count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
