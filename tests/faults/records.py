"""MLflow: stores that are locked, full, damaged, old or gone, and servers that die, hang or are not there."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tests.conftest import environment
from tests.faults.injected import HURRY
from tests.faults.registry import case
from tests.faults.runs import (
    EPOCHS_A_TRY,
    HERE,
    assert_recorded_once,
    assert_same_as_uninterrupted,
    rows,
    settings,
    statuses,
)
from tests.faults.scene import LIMIT, Ended, Running, Scene, says
from tests.faults.storage import fill, remount, tmpfs

SERVED = "server.db"  # the store behind the server
DELIVERED = "cifar-exp sync delivers every point once"


class Server:
    """An MLflow server on loopback, over a store in the scene, that can be killed and started again."""

    def __init__(self, scene: Scene) -> None:
        self._scene, self.port = scene, free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        store = f"sqlite:///{self._scene.folder / SERVED}"
        artifacts = f"--artifacts-destination={self._scene.folder / 'server-artifacts'}"
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, artifacts, *where]
        env = environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # five processes that are not needed
        with (self._scene.base / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self._scene.base, env=env, stdout=log, stderr=log, process_group=0
            )
        deadline = time.monotonic() + LIMIT
        while not self._is_up():
            assert time.monotonic() < deadline, "the MLflow server does not start"
            time.sleep(0.2)

    def signal(self, number: int) -> None:
        assert self._process
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process:
            with suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self._process.wait()

    def _is_up(self) -> bool:
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{self.address}/health", timeout=5):
                return True
        except OSError:
            return False


@contextmanager
def mlflow_server(scene: Scene) -> Iterator[Server]:
    server = Server(scene)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def served(run: tuple[str, ...], address: str) -> tuple[str, ...]:
    return (*run, *HERE, f"tracking.uri={address}")


def until_recorded(scene: Scene, running: Running, count: int, database: str) -> None:
    """Wait until the store has so many points."""

    def enough() -> bool:
        with suppress(sqlite3.Error):
            return len(rows(scene, "SELECT key FROM metrics", database)) >= count
        return False

    running.until(lambda: (scene.folder / database).exists() and enough(), f"the record of {count} points")


def owes(ended: Ended, *words: str) -> None:
    """Trained to the end, not everything delivered: 5, and what to type."""
    says(ended, 5, "nothing is lost", "cifar-exp sync run", *words)


def deliver(scene: Scene, *arguments: str, database: str = "outputs/mlflow.db") -> None:
    """Set what the run said, once its store is there again, and twice: each point is there once."""
    for _ in range(2):
        says(scene.run("sync", "run", *arguments), 0)
        assert_recorded_once(scene, database=database)
        assert statuses(scene, database)[-1] == "FINISHED"


@case("the MLflow server is killed and restarted", racy=True, slow=True, needs=("sync",))
def server_restarts(scene: Scene) -> None:
    def outage(server: Server) -> None:
        time.sleep(scene.random.uniform(0, 3))
        server.kill()
        time.sleep(scene.random.uniform(0, 3))
        server.start()

    survives(scene, "the MLflow server is killed and restarted", outage)


@case("the MLflow server hangs for a while (SIGSTOP)", racy=True, needs=("sync", "linux"))
def server_hangs(scene: Scene) -> None:
    def outage(server: Server) -> None:
        time.sleep(scene.random.uniform(0, 2))
        server.signal(signal.SIGSTOP)
        time.sleep(scene.random.uniform(0, 6))
        server.signal(signal.SIGCONT)

    survives(scene, "the MLflow server hangs for a while (SIGSTOP)", outage)


def survives(scene: Scene, fault: str, outage: Callable[[Server], None]) -> None:
    """One run over all outages; it ends with 0, and the store has every point once."""
    run = settings(100)
    with mlflow_server(scene) as server:
        running = scene.start(*served(run, server.address), plan={"pace": 2.0}, env={"no_proxy": "127.0.0.1"})
        until_recorded(scene, running, 20, SERVED)
        for _ in range(scene.times):
            outage(server)
        (scene.folder / HURRY).touch()
        says_back(running.wait())
    assert statuses(scene, SERVED) == ["FINISHED"]
    assert_recorded_once(scene, database=SERVED)
    assert_same_as_uninterrupted(scene, run)
    for _ in range(scene.times):
        scene.handled(fault, "none needed: every point is there once")


def says_back(ended: Ended) -> None:
    """Trained and recorded; what it says of the tracker meanwhile is its own matter."""
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err, ended.err


@case("there is no MLflow server", needs=("sync",))
def no_server(scene: Scene) -> None:
    run, server = settings(EPOCHS_A_TRY), Server(scene)
    owes(scene.run(*served(run, server.address), env={"no_proxy": "127.0.0.1"}), server.address)
    assert_same_as_uninterrupted(scene, run)
    try:
        server.start()
        deliver(scene, f"tracking.uri={server.address}", database=SERVED)
    finally:
        server.kill()
    scene.handled("there is no MLflow server", DELIVERED)


@case("a server that accepts and never answers", "SIGTERM while the server does not answer", needs=("sync",))
def silent_server(scene: Scene) -> None:
    """The training does not wait for it, and its end does so for a bounded time only."""
    run = settings(4)
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ended = scene.run(*served(run, address), env={"no_proxy": "127.0.0.1"})
        owes(ended)
        running = scene.start(
            *settings(10_000), "hydra.run.dir=other", f"tracking.uri={address}", plan={"pace": 0.01},
            env={"no_proxy": "127.0.0.1"},
        )  # fmt: skip
        running.until_training(scene.journal("other"), lines=10)
        asked = time.monotonic()
        running.signal(signal.SIGTERM)
        stopped = running.wait(60)
        says(stopped, 143)
        assert time.monotonic() - asked < 15, f"{time.monotonic() - asked:.0f} s from SIGTERM to the end"
    assert_same_as_uninterrupted(scene, run)
    deliver(scene, "tracking.uri=null")
    scene.handled("a server that accepts and never answers", DELIVERED)
    scene.handled("SIGTERM while the server does not answer", "goes on")


@case("SQLite held exclusively for 60 s", needs=("sync",))
def store_locked(scene: Scene) -> None:
    """A minute of somebody else's transaction, over the end of the training: everything is delivered, then or later."""
    run = settings(EPOCHS_A_TRY)
    running = scene.start(*run, *HERE, plan={"pace": 2.0})
    until_recorded(scene, running, 5, "outputs/mlflow.db")
    connection = sqlite3.connect(scene.folder / "outputs/mlflow.db", timeout=60, isolation_level=None,
                                 check_same_thread=False)  # fmt: skip
    connection.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(60, connection.execute, ["COMMIT"])
    release.start()
    (scene.folder / HURRY).touch()
    ended = running.wait()
    release.join()
    connection.close()
    assert_same_as_uninterrupted(scene, run)
    if ended.code == 5:
        owes(ended, "locked")
        deliver(scene)
    else:
        says_back(ended)
    assert_recorded_once(scene)
    scene.handled("SQLite held exclusively for 60 s", DELIVERED if ended.code else "none needed: it waited")


@case("disk full under SQLite", needs=("mounts", "sync"))
def store_full(scene: Scene) -> None:
    run = settings(EPOCHS_A_TRY)
    with tmpfs(scene.folder / "store", "16m") as store:
        database = "store/mlflow.db"
        uri = f"tracking.uri=sqlite:///{store / 'mlflow.db'}"
        running = scene.start(*run, *HERE, uri, plan={"pace": 2.0})
        until_recorded(scene, running, 5, database)
        filler = fill(store)
        (scene.folder / HURRY).touch()
        owes(running.wait(), "full")
        assert_same_as_uninterrupted(scene, run)
        filler.unlink()
        deliver(scene, uri, database=database)
    scene.handled("disk full under SQLite", DELIVERED)


@case("a store on a read-only mount", needs=("mounts", "sync"))
def store_read_only(scene: Scene) -> None:
    run = settings(2)
    with tmpfs(scene.folder / "store", "16m") as store:
        uri = f"tracking.uri=sqlite:///{store / 'mlflow.db'}"
        says(scene.run(*run, "hydra.run.dir=first", uri), 0)
        remount(store, "ro")
        owes(scene.run(*run, *HERE, uri))
        remount(store, "rw")
        deliver(scene, uri, database="store/mlflow.db")
    assert_same_as_uninterrupted(scene, run)
    scene.handled("a store on a read-only mount", DELIVERED)


def spoilt_store(scene: Scene, fault: str, spoil: str, mend: str, *words: str) -> None:
    """A store that a statement spoils before the run and another mends after it."""
    run = settings(2)
    says(scene.run(*run, "hydra.run.dir=first"), 0)
    execute(scene, spoil)
    owes(scene.run(*run, *HERE), *words)
    execute(scene, mend)
    deliver(scene)
    assert_same_as_uninterrupted(scene, run)
    scene.handled(fault, DELIVERED)


def execute(scene: Scene, statement: str) -> None:
    connection = sqlite3.connect(scene.folder / "outputs/mlflow.db", timeout=60)
    with connection:
        connection.executescript(statement)
    connection.close()


@case("a store of an old MLflow", needs=("sync",))
def store_old(scene: Scene) -> None:
    says(scene.run(*settings(2), "hydra.run.dir=zero"), 0)
    ((head,),) = rows(scene, "SELECT version_num FROM alembic_version")
    spoil, mend = (f"UPDATE alembic_version SET version_num = '{name}'" for name in ("451aebb31d03", head))
    spoilt_store(scene, "a store of an old MLflow", spoil, mend, "mlflow db upgrade")


@case("a store of a newer MLflow", needs=("sync",))
def store_newer(scene: Scene) -> None:
    says(scene.run(*settings(2), "hydra.run.dir=zero"), 0)
    ((head,),) = rows(scene, "SELECT version_num FROM alembic_version")
    spoil, mend = (f"UPDATE alembic_version SET version_num = '{name}'" for name in ("ffffffffffff", head))
    spoilt_store(scene, "a store of a newer MLflow", spoil, mend)


@case("the experiment was deleted in MLflow", needs=("sync",))
def experiment_deleted(scene: Scene) -> None:
    spoil, mend = (
        f"UPDATE experiments SET lifecycle_stage = '{stage}' WHERE name = 'cifar-exp'"
        for stage in ("deleted", "active")
    )
    spoilt_store(scene, "the experiment was deleted in MLflow", spoil, mend, "tracking.experiment")


@case("a store that is no database", needs=("sync",))
def store_corrupt(scene: Scene) -> None:
    run = settings(2)
    database = scene.folder / "outputs" / "mlflow.db"
    database.parent.mkdir()
    database.write_bytes(b"this is no database" * 1000)
    owes(scene.run(*run, *HERE), "not a database")
    database.unlink()
    deliver(scene)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("a store that is no database", DELIVERED)


@case("the store is deleted while it trains", needs=("sync",))
def store_deleted(scene: Scene) -> None:
    run = settings(EPOCHS_A_TRY)
    running = scene.start(*run, *HERE, plan={"pace": 2.0})
    until_recorded(scene, running, 5, "outputs/mlflow.db")
    for path in (scene.folder / "outputs").glob("mlflow.db*"):
        path.unlink()
    (scene.folder / HURRY).touch()
    ended = running.wait()
    says(ended, ended.code if ended.code == 0 else 5)
    deliver(scene)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("the store is deleted while it trains", DELIVERED)


def cut_run(scene: Scene, run: tuple[str, ...]) -> None:
    """A run whose parent was killed."""
    running = scene.start(*run, *HERE, plan={"pace": 2.0})
    until_recorded(scene, running, 5, "outputs/mlflow.db")
    running.signal(signal.SIGKILL)
    running.wait()


@case("the run was deleted in MLflow before it goes on", needs=("sync",))
def run_deleted(scene: Scene) -> None:
    """It goes on, and is recorded: as a new run, or as the old one once that is restored."""
    run = settings(EPOCHS_A_TRY)
    cut_run(scene, run)
    execute(scene, "UPDATE runs SET lifecycle_stage = 'deleted'")
    ended = scene.run(*run, *HERE)
    if ended.code:
        owes(ended)
        execute(scene, "UPDATE runs SET lifecycle_stage = 'active'")
        deliver(scene)
    else:
        says(ended, 0)
    assert_recorded_once(scene)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("the run was deleted in MLflow before it goes on", "goes on, bit for bit, and is recorded")


@case("a damaged mlflow_run_id")
def run_id_damaged(scene: Scene) -> None:
    run = settings(EPOCHS_A_TRY)
    cut_run(scene, run)
    (scene.folder / "run" / "mlflow_run_id").write_text("0123\n")
    says(scene.run(*run, *HERE), 0)
    assert_recorded_once(scene)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("a damaged mlflow_run_id", "goes on, bit for bit, as a new run of MLflow")


@case("SIGKILL while the store is made", racy=True, needs=("linux",))
def killed_while_the_store_is_made(scene: Scene) -> None:
    """A half-made store is finished, or made anew, by the next start."""
    run = settings(1)
    for number in range(scene.times):
        database = f"store-{number}.db"
        uri = f"tracking.uri=sqlite:///{scene.folder / database}"
        running = scene.start(*run, f"hydra.run.dir=cut-{number}", uri, plan={"pace": 2.0})
        running.until((scene.folder / database).exists, "the making of the store")
        time.sleep(scene.random.uniform(0, 2))
        running.signal(signal.SIGKILL)
        running.wait()
        says(scene.run(*run, f"hydra.run.dir=next-{number}", uri), 0)
        assert statuses(scene, database)[-1] == "FINISHED"
        assert_recorded_once(scene, f"next-{number}", database)
        scene.handled("SIGKILL while the store is made", "finishes it and records its run")


@case("a run left RUNNING by a parent that was killed", racy=True, needs=("stale", "linux"))
def stale_run(scene: Scene) -> None:
    """Any next start on this machine closes it as KILLED."""
    run = settings(1)
    for number in range(scene.times):
        running = scene.start(*settings(1000, f"seed={number}"), f"hydra.run.dir=cut-{number}", plan={"pace": 0.05})
        running.until((scene.folder / f"cut-{number}" / "mlflow_run_id").exists, "its record")
        time.sleep(scene.random.uniform(0, 0.5))
        running.signal(signal.SIGKILL)
        running.wait()
        assert statuses(scene).count("RUNNING") == 1
        says(scene.run(*run, f"hydra.run.dir=next-{number}"), 0)
        assert statuses(scene) == ["KILLED", "FINISHED"] * (number + 1)
        # Its user gives it up: what a killed writer has left there is cleared by a start that goes on with the run.
        shutil.rmtree(scene.folder / f"cut-{number}")
        scene.handled("a run left RUNNING by a parent that was killed", "closes it as KILLED")
