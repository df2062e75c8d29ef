"""What several tests need: a tiny run, a place to run it in, and the command line as a real process."""

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
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cifar_exp.distributed.process_group import World
from tests.helpers.servers import mlflow_server  # noqa: F401
from tests.helpers.worlds import world_of_one

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
# Commands and their nurseries are forked from a process that has imported what they need: importing it costs each more
# than its work. Those that are ``started`` are born as users' are.
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


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first tracked command in a folder makes; it takes MLflow seconds."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    SqlAlchemyStore(f"sqlite:///{path}", path.parent.as_uri()).engine.dispose()
    return path


@pytest.fixture
def store(workplace: Path, empty_store: Path) -> Path:
    """The empty store that commands in ``workplace`` find, made before."""
    (workplace / "outputs").mkdir(mode=0o700)
    return Path(shutil.copy(empty_store, workplace / "outputs"))


@pytest.fixture
def no_store(store: Path) -> None:
    """There is none: a command has to make it."""
    shutil.rmtree(store.parent)


@pytest.fixture
def cifar_exp(store: Path) -> Command:
    """``cifar_exp("train.epochs=1", ...)``: the command in ``workplace``, its output captured."""
    workplace = store.parents[1]

    def run(
        *arguments: str, module: str = "cifar_exp.cli.main", timeout: float = 180
    ) -> subprocess.CompletedProcess[str]:
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
def started(store: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Like ``cifar_exp``, but does not wait; whatever is still running at the end of the test is ended."""
    workplace = store.parents[1]
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
    multiprocessing.util.spawnv_passfds = forked_or(multiprocessing.util.spawnv_passfds)  # type: ignore[attr-defined]
    try:
        sys.exit(importlib.import_module(module).main())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()


def forked_or(spawn: Callable[..., int]) -> Callable[..., int]:
    """What Python starts helpers with; a fork server comes from this process, as a new interpreter would be."""

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
                forkserver._forkserver.__init__()  # its lock is held meanwhile
                for before, after in pairwise(sorted({2, *descriptors, os.sysconf("SC_OPEN_MAX")})):
                    if after > before + 1:  # an empty range would be taken for all there are
                        os.closerange(before + 1, after)
                exec(code, {})
            finally:
                os._exit(1)
        return pid

    return start


def environment() -> dict[str, str]:
    """The environment of this process with the project on the path, wherever the command runs."""
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "COLUMNS": "160"}


def the_run(folder: Path) -> Path:
    """The folder of the only run under ``folder``/outputs."""
    (journal,) = (folder / "outputs").rglob("run.json")
    return journal.parent


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As many for torch, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
