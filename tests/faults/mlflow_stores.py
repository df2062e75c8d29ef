"""MLflow: stores that are locked, full, damaged, old or deleted, and servers that die, hang or are missing."""

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
from tests.faults.scene import LIMIT, Ended, Running, Scene, check_exit
from tests.faults.storage import fill, remount, tmpfs

SERVED = "server.db"  # the store behind the server
DELIVERED = "cifar-exp sync delivers every point once"


class Server:
    """An MLflow server on loopback that can be killed and restarted. Its store is in the scene's folder."""

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
        env = environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # saves five processes
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
    """Wait until the store has ``count`` points."""

    def enough() -> bool:
        with suppress(sqlite3.Error):
            return len(rows(scene, "SELECT key FROM metrics", database)) >= count
        return False

    running.until(lambda: (scene.folder / database).exists() and enough(), f"{count} points in the store")


def check_undelivered(ended: Ended, *words: str) -> None:
    """Check that training finished, and that exit code and message say that points are undelivered."""
    check_exit(ended, 5, "nothing is lost", "cifar-exp sync run", *words)


def sync_twice(scene: Scene, *arguments: str, database: str = "outputs/mlflow.db") -> None:
    """Run `cifar-exp sync` twice and check that the store has each point once."""
    for _ in range(2):
        check_exit(scene.run("sync", "run", *arguments), 0)
        assert_recorded_once(scene, database=database)
        assert statuses(scene, database)[-1] == "FINISHED"


@case("the MLflow server is killed and restarted", racy=True, slow=True, needs=("sync",))
def server_restarts(scene: Scene) -> None:
    def outage(server: Server) -> None:
        time.sleep(scene.random.uniform(0, 3))
        server.kill()
        time.sleep(scene.random.uniform(0, 3))
        server.start()

    train_through_outages(scene, "the MLflow server is killed and restarted", outage)


@case("the MLflow server hangs for a while (SIGSTOP)", racy=True, needs=("sync", "linux"))
def server_hangs(scene: Scene) -> None:
    def outage(server: Server) -> None:
        time.sleep(scene.random.uniform(0, 2))
        server.signal(signal.SIGSTOP)
        time.sleep(scene.random.uniform(0, 6))
        server.signal(signal.SIGCONT)

    train_through_outages(scene, "the MLflow server hangs for a while (SIGSTOP)", outage)


def train_through_outages(scene: Scene, fault: str, outage: Callable[[Server], None]) -> None:
    """One run through all outages: it ends with 0, and the store has every point once."""
    run = settings(100)
    with mlflow_server(scene) as server:
        running = scene.start(*served(run, server.address), plan={"pace": 2.0}, env={"no_proxy": "127.0.0.1"})
        until_recorded(scene, running, 20, SERVED)
        for _ in range(scene.times):
            outage(server)
        (scene.folder / HURRY).touch()
        check_delivered(running.wait())
    assert statuses(scene, SERVED) == ["FINISHED"]
    assert_recorded_once(scene, database=SERVED)
    assert_same_as_uninterrupted(scene, run)
    for _ in range(scene.times):
        scene.handled(fault, "none needed: the store has every point once")


def check_delivered(ended: Ended) -> None:
    """Check that the run was trained and delivered. Messages about the tracker are allowed."""
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err, ended.err


@case("there is no MLflow server", needs=("sync",))
def no_server(scene: Scene) -> None:
    run, server = settings(EPOCHS_A_TRY), Server(scene)
    check_undelivered(scene.run(*served(run, server.address), env={"no_proxy": "127.0.0.1"}), server.address)
    assert_same_as_uninterrupted(scene, run)
    try:
        server.start()
        sync_twice(scene, f"tracking.uri={server.address}", database=SERVED)
    finally:
        server.kill()
    scene.handled("there is no MLflow server", DELIVERED)


@case("a server that accepts and never answers", "SIGTERM while the server does not answer", needs=("sync",))
def silent_server(scene: Scene) -> None:
    """Training does not wait for the server, and the end of the run waits for a limited time."""
    run = settings(4)
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ended = scene.run(*served(run, address), env={"no_proxy": "127.0.0.1"})
        check_undelivered(ended)
        running = scene.start(
            *settings(10_000), "hydra.run.dir=other", f"tracking.uri={address}", plan={"pace": 0.01},
            env={"no_proxy": "127.0.0.1"},
        )  # fmt: skip
        running.until_training(scene.journal("other"), lines=10)
        asked = time.monotonic()
        running.signal(signal.SIGTERM)
        stopped = running.wait(60)
        check_exit(stopped, 143)
        assert time.monotonic() - asked < 15, f"{time.monotonic() - asked:.0f} s from SIGTERM to the end"
    assert_same_as_uninterrupted(scene, run)
    sync_twice(scene, "tracking.uri=null")
    scene.handled("a server that accepts and never answers", DELIVERED)
    scene.handled("SIGTERM while the server does not answer", "resumes")


@case("SQLite held exclusively for 60 s", needs=("sync",))
def store_locked(scene: Scene) -> None:
    """Another process locks the store for 60 s, beyond the end of training. All points are delivered then or later."""
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
        check_undelivered(ended, "locked")
        sync_twice(scene)
    else:
        check_delivered(ended)
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
        check_undelivered(running.wait(), "full")
        assert_same_as_uninterrupted(scene, run)
        filler.unlink()
        sync_twice(scene, uri, database=database)
    scene.handled("disk full under SQLite", DELIVERED)


@case("a store on a read-only mount", needs=("mounts", "sync"))
def store_read_only(scene: Scene) -> None:
    run = settings(2)
    with tmpfs(scene.folder / "store", "16m") as store:
        uri = f"tracking.uri=sqlite:///{store / 'mlflow.db'}"
        check_exit(scene.run(*run, "hydra.run.dir=first", uri), 0)
        remount(store, "ro")
        check_undelivered(scene.run(*run, *HERE, uri))
        remount(store, "rw")
        sync_twice(scene, uri, database="store/mlflow.db")
    assert_same_as_uninterrupted(scene, run)
    scene.handled("a store on a read-only mount", DELIVERED)


def train_with_damaged_store(scene: Scene, fault: str, damage: str, mend: str, *words: str) -> None:
    """Damage the store by an SQL statement, train, repair it by another, and deliver."""
    run = settings(2)
    check_exit(scene.run(*run, "hydra.run.dir=first"), 0)
    execute(scene, damage)
    check_undelivered(scene.run(*run, *HERE), *words)
    execute(scene, mend)
    sync_twice(scene)
    assert_same_as_uninterrupted(scene, run)
    scene.handled(fault, DELIVERED)


def execute(scene: Scene, statement: str) -> None:
    connection = sqlite3.connect(scene.folder / "outputs/mlflow.db", timeout=60)
    with connection:
        connection.executescript(statement)
    connection.close()


@case("a store of an old MLflow", needs=("sync",))
def store_old(scene: Scene) -> None:
    check_exit(scene.run(*settings(2), "hydra.run.dir=zero"), 0)
    ((head,),) = rows(scene, "SELECT version_num FROM alembic_version")
    damage, mend = (f"UPDATE alembic_version SET version_num = '{name}'" for name in ("451aebb31d03", head))
    train_with_damaged_store(scene, "a store of an old MLflow", damage, mend, "mlflow db upgrade")


@case("a store of a newer MLflow", needs=("sync",))
def store_newer(scene: Scene) -> None:
    check_exit(scene.run(*settings(2), "hydra.run.dir=zero"), 0)
    ((head,),) = rows(scene, "SELECT version_num FROM alembic_version")
    damage, mend = (f"UPDATE alembic_version SET version_num = '{name}'" for name in ("ffffffffffff", head))
    train_with_damaged_store(scene, "a store of a newer MLflow", damage, mend)


@case("the experiment was deleted in MLflow", needs=("sync",))
def experiment_deleted(scene: Scene) -> None:
    damage, mend = (
        f"UPDATE experiments SET lifecycle_stage = '{stage}' WHERE name = 'cifar-exp'"
        for stage in ("deleted", "active")
    )
    train_with_damaged_store(scene, "the experiment was deleted in MLflow", damage, mend, "tracking.experiment")


@case("a store that is not a database", needs=("sync",))
def store_corrupt(scene: Scene) -> None:
    run = settings(2)
    database = scene.folder / "outputs" / "mlflow.db"
    database.parent.mkdir()
    database.write_bytes(b"this is no database" * 1000)
    check_undelivered(scene.run(*run, *HERE), "not a database")
    database.unlink()
    sync_twice(scene)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("a store that is not a database", DELIVERED)


@case("the store is deleted while it trains", needs=("sync",))
def store_deleted(scene: Scene) -> None:
    run = settings(EPOCHS_A_TRY)
    running = scene.start(*run, *HERE, plan={"pace": 2.0})
    until_recorded(scene, running, 5, "outputs/mlflow.db")
    for path in (scene.folder / "outputs").glob("mlflow.db*"):
        path.unlink()
    (scene.folder / HURRY).touch()
    ended = running.wait()
    check_exit(ended, ended.code if ended.code == 0 else 5)
    sync_twice(scene)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("the store is deleted while it trains", DELIVERED)


def kill_parent(scene: Scene, run: tuple[str, ...]) -> None:
    """Start a run and kill its parent."""
    running = scene.start(*run, *HERE, plan={"pace": 2.0})
    until_recorded(scene, running, 5, "outputs/mlflow.db")
    running.signal(signal.SIGKILL)
    running.wait()


@case("the run was deleted in MLflow before it resumes", needs=("sync",))
def run_deleted(scene: Scene) -> None:
    """It resumes and is delivered: as a new MLflow run, or as the old one after that is restored."""
    run = settings(EPOCHS_A_TRY)
    kill_parent(scene, run)
    execute(scene, "UPDATE runs SET lifecycle_stage = 'deleted'")
    ended = scene.run(*run, *HERE)
    if ended.code:
        check_undelivered(ended)
        execute(scene, "UPDATE runs SET lifecycle_stage = 'active'")
        sync_twice(scene)
    else:
        check_exit(ended, 0)
    assert_recorded_once(scene)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("the run was deleted in MLflow before it resumes", "resumes, bit for bit, and is delivered")


@case("a damaged mlflow_run_id")
def run_id_damaged(scene: Scene) -> None:
    run = settings(EPOCHS_A_TRY)
    kill_parent(scene, run)
    (scene.folder / "run" / "mlflow_run_id").write_text("0123\n")
    check_exit(scene.run(*run, *HERE), 0)
    assert_recorded_once(scene)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("a damaged mlflow_run_id", "resumes, bit for bit, as a new MLflow run")


@case("SIGKILL while the store is created", racy=True, needs=("linux",))
def killed_while_the_store_is_created(scene: Scene) -> None:
    """The next start completes an incomplete store, or creates it again."""
    run = settings(1)
    for number in range(scene.times):
        database = f"store-{number}.db"
        uri = f"tracking.uri=sqlite:///{scene.folder / database}"
        running = scene.start(*run, f"hydra.run.dir=cut-{number}", uri, plan={"pace": 2.0})
        running.until((scene.folder / database).exists, "the creation of the store")
        time.sleep(scene.random.uniform(0, 2))
        running.signal(signal.SIGKILL)
        running.wait()
        check_exit(scene.run(*run, f"hydra.run.dir=next-{number}", uri), 0)
        assert statuses(scene, database)[-1] == "FINISHED"
        assert_recorded_once(scene, f"next-{number}", database)
        scene.handled("SIGKILL while the store is created", "completes it and delivers its run")


@case("a run left RUNNING by a parent that was killed", racy=True, needs=("stale", "linux"))
def run_left_running(scene: Scene) -> None:
    """The next start on this machine sets its status to KILLED."""
    run = settings(1)
    for number in range(scene.times):
        running = scene.start(*settings(1000, f"seed={number}"), f"hydra.run.dir=cut-{number}", plan={"pace": 0.05})
        running.until((scene.folder / f"cut-{number}" / "mlflow_run_id").exists, "its MLflow run")
        time.sleep(scene.random.uniform(0, 0.5))
        running.signal(signal.SIGKILL)
        running.wait()
        assert statuses(scene).count("RUNNING") == 1
        check_exit(scene.run(*run, f"hydra.run.dir=next-{number}"), 0)
        assert statuses(scene) == ["KILLED", "FINISHED"] * (number + 1)
        # Only a resume would remove the killed writer's temporary files, and this run is not resumed.
        shutil.rmtree(scene.folder / f"cut-{number}")
        scene.handled("a run left RUNNING by a parent that was killed", "sets its status to KILLED")
