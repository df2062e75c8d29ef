"""Many writers at once into the store of docs/recipes/team-store.sh: does PostgreSQL get every point exactly once?

The recipe is started as its page says, in a temporary folder. Each writer is a process of its own. It writes a journal
at an even pace, as a run does, and delivers it by the package's own path: journal, follower, MLflow's client, HTTP,
server, PostgreSQL. With ``--restarts`` the recipe is ended by SIGTERM and started again while they write; with
``--crashes`` its database and its server are killed. A writer that gives up (exit code 5) is delivered by the code of
``cifar-exp sync`` afterwards. At the end each row in PostgreSQL is compared with the journals.

    uv run --extra team python benchmarks/team_store.py --restarts 1 --crashes 1
"""

import argparse
import json
import multiprocessing
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pathlib import Path

from cifar_exp.errors import TrackingError
from cifar_exp.records import journal
from cifar_exp.records.journal import Entry, JournalWriter
from cifar_exp.records.run_folder import CONFIG_FILE, RunInfo
from cifar_exp.tracking.mlflow_tracker import MLflowTracker
from cifar_exp.tracking.recorder import Recording

RECIPE = Path(__file__).resolve().parent.parent / "docs" / "recipes" / "team-store.sh"
METRICS = ("step/loss", "step/accuracy", "step/images_per_second", "step/lr", "step/seconds")
UP_SECONDS = 300


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writers", type=int, default=16)
    parser.add_argument("--points", type=int, default=10_000, help="of each writer; a multiple of 5")
    parser.add_argument("--seconds", type=float, default=60, help="that a writer takes to write its journal")
    parser.add_argument("--restarts", type=int, default=0, help="SIGTERM to the recipe, and another start")
    parser.add_argument("--crashes", type=int, default=0, help="SIGKILL to database and server, and another start")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="team-store-benchmark-") as folder:
        Path(folder).chmod(0o711)  # the database may run as another user
        return measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> int:
    with running(TeamStore(folder / "store", free_port(), free_port())) as store:
        os.environ.update(store.login())  # by the environment, as for a user
        began = time.monotonic()
        writers = [start_writer(folder / f"run-{number}", store, options) for number in range(options.writers)]
        faults = disturb(store, options, writers)
        for process in writers:
            process.join()
        seconds = time.monotonic() - began
        late = [number for number, process in enumerate(writers) if process.exitcode]
        for number in late:
            print(tracker(store.address).deliver(folder / f"run-{number}"), flush=True)
        found = check(store, [folder / f"run-{number}" for number in range(options.writers)])
    from harness import RESULTS, machine  # imports torch, which writers do not need

    result = {
        **{"benchmark": "team_store", "date": datetime.now(UTC).isoformat(timespec="minutes"), "machine": machine()},
        **{"writers": options.writers, "points of each": options.points, "faults": faults},
        **{"seconds": round(seconds, 1), "writers delivered by sync": len(late), **found},
    }
    print(json.dumps(result, indent=1))
    is_right = found["wanted"] == found["found once"] == found["rows"] and found["finished"] == options.writers
    print("every point once" if is_right else "POINTS ARE MISSING OR DOUBLED")
    name = "-".join(["team_store", *(["faults"] if faults else [])])
    if options.writers > 1:
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return int(not is_right)


# The store


@dataclass
class TeamStore:
    """The recipe as a process."""

    folder: Path
    port: int
    database_port: int
    password: str = secrets.token_urlsafe()
    database_password: str = secrets.token_urlsafe()
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def login(self) -> dict[str, str]:
        """The variables with which a user writes to the store."""
        name = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": self.password}
        return name | {"no_proxy": "127.0.0.1"}

    def start(self) -> None:
        settings = {
            "TEAM_STORE_PASSWORD": self.password,
            "TEAM_STORE_DB_PASSWORD": self.database_password,
            "TEAM_STORE_PORT": str(self.port),
            "TEAM_STORE_DB_PORT": str(self.database_port),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        command = ["bash", str(RECIPE), str(self.folder)]
        self.process = subprocess.Popen(command, env=os.environ | settings, process_group=0)
        deadline = time.monotonic() + UP_SECONDS
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the recipe does not start; see {self.folder}/server.log")
            time.sleep(0.5)

    def stop(self) -> None:
        assert self.process
        self.process.terminate()
        self.process.wait(60)

    def crash(self) -> None:
        """Kill the database's first process and the server's, as a loss of power would end them."""
        assert self.process
        database = int((self.folder / "database" / "postmaster.pid").read_text().split()[0])
        os.kill(database, signal.SIGKILL)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        while is_running(database):
            time.sleep(0.1)
        time.sleep(2)  # its children end by themselves

    def _is_up(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with suppress(OSError), opener.open(f"{self.address}/health", timeout=5):
            return True
        return False


@contextmanager
def running(store: TeamStore) -> Iterator[TeamStore]:
    try:
        store.start()
        yield store
    finally:
        store.stop()


def is_running(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def disturb(store: TeamStore, options: argparse.Namespace, writers: list[BaseProcess]) -> list[str]:
    """End the store and start it again, evenly spread over the time in which the journals are written."""
    faults = [*(["crash"] * options.crashes), *(["restart"] * options.restarts)]
    for fault in faults:
        time.sleep(options.seconds / (len(faults) + 1))
        alive = sum(process.is_alive() for process in writers)
        print(f"{fault}, while {alive} writers are running", flush=True)
        (store.crash if fault == "crash" else store.stop)()
        store.start()
    return faults


# A writer


def start_writer(folder: Path, store: TeamStore, options: argparse.Namespace) -> BaseProcess:
    """A process of its own. A server forks it, so that MLflow is imported once and not sixteen times."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "cifar_exp.tracking.mlflow_tracker", "cifar_exp.tracking.recorder"])
    process = context.Process(target=write, args=(folder, store.address, options.points, options.seconds))
    process.start()
    return process


def tracker(address: str) -> MLflowTracker:
    return MLflowTracker(address, "sixteen writers")


class NoDisplay:
    """A display that shows nothing."""

    def open(self) -> None: ...

    def write(self, entries: object) -> None: ...

    def close(self, status: object) -> None: ...

    def is_final(self, error: Exception) -> bool:  # noqa: ARG002
        return True


def write(folder: Path, address: str, points: int, seconds: float) -> None:
    """Be one run: write a journal of ``points`` metric values and deliver it meanwhile."""
    folder.mkdir()
    (folder / CONFIG_FILE).write_text("tracking: {_target_: cifar_exp.tracking.mlflow_tracker.MLflowTracker}\n")
    run = RunInfo(folder.name, folder, {"model.width": 32}, {"devices": "1"}, time.time(), artifacts=(CONFIG_FILE,))
    run.save("hash")
    steps, began = points // len(METRICS), time.monotonic()
    sink = tracker(address)
    try:
        with Recording(folder, began, sink.sink(run), sink.store()) as recording:
            recording.start(NoDisplay())
            with JournalWriter(folder) as writer:
                for step in range(1, steps + 1):
                    now = time.monotonic() - began
                    values = {name: step + place / 10 for place, name in enumerate(METRICS)}
                    writer.write(Entry(step, 1 + step * 10 // steps, now, values))
                    time.sleep(max(0.0, began + seconds * step / steps - time.monotonic()))
    except TrackingError as error:
        print(f"{folder.name}: {str(error).splitlines()[0]}", flush=True)
        sys.exit(error.exit_code)


# The count


def check(store: TeamStore, folders: list[Path]) -> dict[str, int]:
    """Compare every row of the metrics in PostgreSQL with the journals."""
    import psycopg

    wanted: Counter[tuple[str, str, int, float]] = Counter()
    for folder in folders:
        for entry in journal.read(folder):
            points = ((str(journal.run_id(folder)), name, entry.step, value) for name, value in entry.metrics.items())
            wanted.update(point for point in points if point[1] in METRICS)
    where = f"host=127.0.0.1 port={store.database_port} user=mlflow dbname=mlflow"
    with psycopg.connect(where, password=store.database_password) as connection:
        query = "SELECT run_uuid, key, step, value FROM metrics WHERE key LIKE 'step/%'"
        rows = Counter((run, key, step, value) for run, key, step, value in connection.execute(query))
        finished = connection.execute("SELECT count(*) FROM runs WHERE status = 'FINISHED'").fetchone()
        runs = connection.execute("SELECT count(*) FROM runs").fetchone()
        size = connection.execute("SELECT pg_total_relation_size('metrics')").fetchone()
    assert finished
    assert runs
    assert size
    return {
        "wanted": wanted.total(),
        "found once": sum(rows[point] == 1 for point in wanted),
        "rows": rows.total(),
        "bytes of a point with its indexes": round(size[0] / rows.total()),
        "runs": runs[0],
        "finished": finished[0],
    }


if __name__ == "__main__":
    sys.exit(main())
