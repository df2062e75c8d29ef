"""What several tests need: a tiny run, a place to run it in, and the command line as a real process."""

import atexit
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cifar_exp.distributed import World
from tests.servers import mlflow_server  # noqa: F401
from tests.worlds import world_of_one

REPO = Path(__file__).resolve().parents[1]
# A whole run in a second or two once its processes are up: 3 steps an epoch, 33 test images.
TINY = [
    *("data=synthetic", "data.train_count=96", "data.test_count=33"),
    *("train.batch_size=32", "train.epochs=2", "train.log_every=1", "model.width=4", "model.depth=1"),
    *("devices=cpu", "devices.count=1"),
]
Command = Callable[..., subprocess.CompletedProcess[str]]
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup; not so for commands, which get no handlers
    signal.signal(signal.SIGHUP, lambda _number, _frame: None)
# Commands are forked from a process that has imported what they need: importing it costs each more than its work.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.command_modules"])


@pytest.fixture
def only_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A real group that the test is the only rank of."""
    with world_of_one(tmp_path_factory.mktemp("group")) as world:
        yield world


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, where a user would stand."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cifar_exp(workplace: Path) -> Command:
    """``cifar_exp("train.epochs=1", ...)``: the command in ``workplace``, its output captured."""

    def run(*arguments: str, module: str = "cifar_exp.main", timeout: float = 180) -> subprocess.CompletedProcess[str]:
        output, errors = workplace / ".stdout", workplace / ".stderr"
        process = FORKS.Process(target=command, args=(module, arguments, workplace, environment(), output, errors))
        with pytest.MonkeyPatch.context() as patch:  # for the process that commands are forked from
            patch.setenv("PYTHONPATH", str(REPO))
            process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout, output.read_bytes(), errors.read_bytes())
        texts = [path.read_text() for path in (output, errors)]
        for path in (output, errors):
            path.unlink()
        return subprocess.CompletedProcess(arguments, process.exitcode, *texts)

    return run


@pytest.fixture
def started(workplace: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Like ``cifar_exp``, but does not wait; whatever is still running at the end of the test is ended."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "cifar_exp", *arguments],
            cwd=workplace,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def command(
    module: str, arguments: tuple[str, ...], folder: Path, variables: dict[str, str], output: Path, errors: Path
) -> None:
    """``module``'s ``main`` as the whole of this process, as if it had been typed in ``folder``."""
    for path, number in ((output, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    # Not multiprocessing's, which are not at the beginning of a line and take no notice of a file
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = ["", *variables.get("PYTHONPATH", "").split(os.pathsep)]
    sys.argv = [module, *arguments]
    try:
        sys.exit(importlib.import_module(module).main())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()


def environment() -> dict[str, str]:
    """The environment of this process with the project on the path, wherever the command runs."""
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "COLUMNS": "160"}


def the_run(folder: Path) -> Path:
    """The folder of the only run under ``folder``/outputs."""
    (journal,) = (folder / "outputs").rglob("run.json")
    return journal.parent
