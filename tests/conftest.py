"""Shared fixtures: a tiny run, a folder to run it in, and the command line as a real process."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

from cifar_exp.distributed.process_group import World
from tests.helpers.commands import REPO, ForkedCommand, environment  # noqa: F401
from tests.helpers.servers import mlflow_server  # noqa: F401
from tests.helpers.worlds import world_of_one

# A whole run in a second or two once its processes are up: 3 steps an epoch, 33 test images.
TINY = [
    *("data=synthetic", "data.train_count=96", "data.test_count=33"),
    *("train.batch_size=32", "train.epochs=2", "train.log_every=1", "model.width=4", "model.depth=1"),
    *("devices=cpu", "devices.count=1"),
]
WORKERS_MEMORY = 3 * 2**30  # bytes
MOST_WORKERS = 4  # tests count threads, processes and processor time, and some use the only GPU
# How long a machine takes is no property of the code, and machines that run tests are busy.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
Command = Callable[..., subprocess.CompletedProcess[str]]


def pytest_xdist_auto_num_workers() -> int:
    """More workers than cores, since many tests wait; limited by memory for them and their commands."""
    memory = psutil.virtual_memory().available
    return max(2, min(2 * (os.cpu_count() or 1), memory // WORKERS_MEMORY, MOST_WORKERS))


@pytest.fixture
def only_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A real process group with the test as its only rank."""
    with world_of_one(tmp_path_factory.mktemp("group")) as world:
        yield world


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that the first tracked command in a folder creates. That takes seconds, so all workers share one."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "empty-store"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "mlflow.db").exists():
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            SqlAlchemyStore(f"sqlite:///{folder / 'made.db'}", folder.as_uri()).engine.dispose()
            (folder / "made.db").rename(folder / "mlflow.db")
    return folder / "mlflow.db"


@pytest.fixture
def store(workplace: Path, empty_store: Path) -> Path:
    """An empty store for the commands in ``workplace``, created in advance."""
    (workplace / "outputs").mkdir(mode=0o700)
    return Path(shutil.copy(empty_store, workplace / "outputs"))


@pytest.fixture
def no_store(store: Path) -> None:
    """No store: the command has to create it."""
    shutil.rmtree(store.parent)


@pytest.fixture
def cifar_exp(store: Path) -> Command:
    """``cifar_exp("train.epochs=1", ...)``: the command in ``workplace``, its output captured."""
    workplace = store.parents[1]

    def run(
        *arguments: str, module: str = "cifar_exp.cli.main", timeout: float = 280
    ) -> subprocess.CompletedProcess[str]:
        process = ForkedCommand(module, arguments, workplace)
        try:
            output, errors = process.communicate(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        return subprocess.CompletedProcess(arguments, process.wait(), output, errors)

    return run


@pytest.fixture
def started(store: Path) -> Iterator[Callable[..., ForkedCommand]]:
    """Like ``cifar_exp``, but does not wait. Processes that still run at the end of the test are killed."""
    processes: list[ForkedCommand] = []

    def start(*arguments: str, module: str = "cifar_exp.cli.main") -> ForkedCommand:
        processes.append(ForkedCommand(module, arguments, store.parents[1]))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def born(store: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Like ``started``, but in a new interpreter, as for a user's command."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "cifar_exp", *arguments],
            cwd=store.parents[1],
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


def the_run(folder: Path) -> Path:
    """The folder of the only run under ``folder``/outputs."""
    (journal,) = (folder / "outputs").rglob("run.json")
    return journal.parent


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads for torch, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
