"""Commands for tests, forked from a process that has already imported PyTorch, MLflow and Hydra.

Imports take a command longer than its work. A forked command has its own process, folder, environment, arguments
and streams. It shares no thread and no state with other commands: the forking process has only imported modules.

Tests of start-up (imports, early signals) start a new interpreter with ``subprocess``.
"""

import atexit
import importlib
import multiprocessing
import multiprocessing.forkserver as forkserver
import multiprocessing.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import chdir
from itertools import pairwise
from pathlib import Path
from unittest import mock

REPO = Path(__file__).resolve().parents[2]
FORKS = multiprocessing.get_context("forkserver")
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup; commands under test must not inherit this
    signal.signal(signal.SIGHUP, lambda _number, _frame: None)


def environment() -> dict[str, str]:
    """The environment of this process with the project on the path, wherever the command runs."""
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "COLUMNS": "160"}


def ready_to_fork() -> None:
    """Start the shared fork server, once per process.

    Call it before any other fork: the first caller sets the preloaded modules.
    """
    FORKS.set_forkserver_preload(["tests.helpers.command_modules", __name__])
    # Not in the folder of the first test: that test may count the processes in its folder.
    with mock.patch.dict(os.environ, PYTHONPATH=str(REPO)), chdir(REPO):
        forkserver.ensure_running()


class ForkedCommand:
    """A running command, with the parts of ``subprocess.Popen`` that tests use.

    Attributes:
        pid: process id.
        args: the arguments as typed.
    """

    def __init__(self, module: str, arguments: tuple[str, ...], folder: Path) -> None:
        """Run ``main`` of ``module`` in a new process in ``folder``."""
        self.args = arguments
        self._streams = Path(tempfile.mkdtemp(prefix="streams-"))
        self._output, self._errors = self._streams / "output", self._streams / "errors"
        given = (module, arguments, folder, environment(), self._output, self._errors)
        self._process = FORKS.Process(target=_command, args=given)
        ready_to_fork()
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout, self._read(self._output), self._read(self._errors))
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the command to end; returns its stdout and stderr, once."""
        self.wait(timeout)
        texts = self._read(self._output).decode(), self._read(self._errors).decode()
        shutil.rmtree(self._streams, ignore_errors=True)
        return texts

    @staticmethod
    def _read(path: Path) -> bytes:
        return path.read_bytes() if path.exists() else b""


def _command(
    module: str, arguments: tuple[str, ...], folder: Path, variables: dict[str, str], output: Path, errors: Path
) -> None:
    """Run ``main`` of ``module`` as this whole process, as if the command had been typed in ``folder``."""
    for path, number in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    # Replace multiprocessing's stdout and stderr: they are not line-buffered into the capture files.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = ["", *variables.get("PYTHONPATH", "").split(os.pathsep)]
    sys.argv = [module, *arguments]
    multiprocessing.util.spawnv_passfds = _forked_or(multiprocessing.util.spawnv_passfds)  # type: ignore[attr-defined]
    try:
        sys.exit(importlib.import_module(module).main())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()


def _forked_or(spawn: Callable[..., int]) -> Callable[..., int]:
    """Replacement for ``spawnv_passfds``: starts a fork server by forking this process, other helpers as usual."""

    def start(path: str, arguments: list[str], descriptors: list[int]) -> int:
        code = arguments[-1]
        if "multiprocessing.forkserver" not in code:
            return spawn(path, arguments, descriptors)
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            try:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    if callable(signal.getsignal(number)):
                        signal.signal(number, signal.SIG_DFL)
                forkserver._forkserver.__init__()  # its lock is held at this point
                # A started fork server has no parent in multiprocessing's sense. This one would inherit the command's,
                # with a sentinel that the lines below close.
                multiprocessing.process._parent_process = None  # type: ignore[attr-defined]
                for before, after in pairwise(sorted({2, *descriptors, os.sysconf("SC_OPEN_MAX")})):
                    if after > before + 1:  # an empty range would mean all descriptors
                        os.closerange(before + 1, after)
                exec(code, {})
            finally:
                os._exit(1)
        return pid

    return start
