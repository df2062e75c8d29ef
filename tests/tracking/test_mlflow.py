"""MLflow gets every point once despite outages. Only runs of dead processes are closed."""

import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from cifar_exp.records import journal
from cifar_exp.records.journal import RUN_ID_FILE, Entry
from cifar_exp.records.run_folder import LOCK_FILE, UNDELIVERED_FILE, Outcome, RunInfo, lock_run_folder
from cifar_exp.system.locks import Owner
from cifar_exp.tracking.dead_runs import owner_tags
from cifar_exp.tracking.follower import Follower
from cifar_exp.tracking.mlflow_tracker import MLflowTracker
from tests.conftest import TINY, Command, environment, the_run
from tests.helpers.marks import linux
from tests.helpers.mlflow_runs import all_runs, client
from tests.helpers.paced import ENDLESS
from tests.helpers.processes import Start, wait_for, wait_for_tracked_runs
from tests.helpers.servers import Relay, relay  # noqa: F401

SLOW = [*ENDLESS, "data.train_count=960", "train.log_every=10"]


def info(run_dir: Path, **more: Any) -> RunInfo:
    run_dir.mkdir(parents=True, exist_ok=True)
    made = RunInfo("a run", run_dir, {"lr": 0.1}, {"devices": "1"}, time.time(), **more)
    made.save("hash")
    return made


def points(store: MlflowClient, run_id: str, run_dir: Path) -> Counter[tuple[str, int, str]]:
    """Name, step and value of every point in the store, for the metrics of a run's journal."""
    names = journal.last_values(run_dir)
    return Counter(
        (name, point.step, repr(point.value)) for name in names for point in store.get_metric_history(run_id, name)
    )


def written(run_dir: Path) -> Counter[tuple[str, int, str]]:
    """Name, step and value of every point in the journal."""
    return Counter(
        (name, entry.step, repr(value)) for entry in journal.read(run_dir) for name, value in entry.metrics.items()
    )


def test_points_sent_repeatedly_are_stored_once(workplace: Path) -> None:
    tracker = MLflowTracker(f"sqlite:///{workplace / 'runs.db'}")
    run = info(workplace / "run")
    entries = [
        Entry(1, 1, 0.5, {"loss": 1.0, "odd (name)": 2.0, "bad": math.nan}),
        Entry(2, 1, 0.75, {"loss": 1.0, "bad": math.nan, "up": math.inf}),
    ]
    for _ in range(3):  # params, which MLflow does not allow to change, and tags are sent again, too
        sink = tracker.sink(run)
        sink.open()
        sink.write(entries[:1])
        sink.write(entries)
        sink.close("FINISHED")
    store = tracker.client()
    (record,) = all_runs(store)
    assert record.info.status == "FINISHED"
    assert record.data.params == {"lr": "0.1"}
    history = {name: store.get_metric_history(record.info.run_id, name) for name in ("loss", "odd _name_", "bad", "up")}
    assert {name: [point.step for point in found] for name, found in history.items()} == {
        "loss": [1, 2],
        "odd _name_": [1],
        "bad": [1, 2],
        "up": [2],
    }
    assert [point.timestamp - record.info.start_time for point in history["loss"]] == [500, 750]
    assert all(math.isnan(point.value) for point in history["bad"])
    assert sink.missing(entries) == []
    assert sink.missing([*entries, Entry(3, 1, 0.9, {"loss": 2.0})]) == [Entry(3, 1, 0.9, {"loss": 2.0})]


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("resumes", [True, False])
def test_run_folder_restored_from_a_backup_duplicates_no_point(workplace: Path, resumes: bool) -> None:
    """The store has steps that the restored journal lacks. They are trained again, with other timestamps."""
    tracker = MLflowTracker()
    run = info(workplace / "run", sessions=("first",))
    before = [Entry(step, 1, step / 2, {"loss": 1.0}) for step in (1, 2, 3)]
    sink = tracker.sink(run)
    sink.open()
    sink.write(before)
    again = [before[0], *(Entry(step, 1, step / 2 + 9, {"loss": 1.5}) for step in (2, 3, 4))]
    sink = tracker.sink(replace(run, sessions=("first", "second")) if resumes else run)
    sink.open()
    sink.write(again if resumes else sink.missing(again))
    assert sink.run_id
    assert [point.step for point in tracker.client().get_metric_history(sink.run_id, "loss")] == [1, 2, 3, 4]
    assert sink.missing(again) == []


def test_follower_waits_for_a_locked_store(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MLflowTracker(f"sqlite:///{workplace / 'made.db'}").client()
    shutil.copy(workplace / "made.db", workplace / "runs.db")  # a copy, because MLflow keeps the first file open
    uri = f"sqlite:///{workplace / 'runs.db'}"
    run = info(workplace / "run")
    writer = journal.JournalWriter(run.run_dir)
    writer.write(Entry(1, 1, 0.5, {"loss": 1.0}))
    writer.close()
    held = sqlite3.connect(workplace / "runs.db", isolation_level=None)
    held.execute("BEGIN EXCLUSIVE")
    follower = Follower(run.run_dir, MLflowTracker(uri).sink(run), interval=0.1)
    follower.start()
    deadline = time.monotonic() + 120
    messages = ""
    while "retrying" not in messages:
        messages += capsys.readouterr().err
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "database is locked" in messages
    held.execute("ROLLBACK")
    held.close()
    follower.finish("FINISHED", answer_seconds=100)
    assert follower.error is None
    messages += capsys.readouterr().err
    assert messages.count("retrying") == messages.count("reachable again") == messages.count("\n") / 2 == 1
    store = MLflowTracker(uri).client()
    (record,) = all_runs(store)
    assert (record.info.status, record.data.metrics) == ("FINISHED", {"loss": 1.0})


def test_lost_answer_creates_no_second_run(workplace: Path, relay: Relay, mlflow_server: int) -> None:  # noqa: F811
    run = info(workplace / "run")
    tracker = MLflowTracker(relay.address, "lost answers")
    sink = tracker.sink(run)
    create = MlflowClient.create_run

    def lose_answer(*arguments: Any, **more: Any) -> Any:
        relay.turn("deaf")
        return create(*arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "create_run", lose_answer)
        with pytest.raises(Exception, match="API request"):
            sink.open()
    relay.turn("pass")
    assert not (run.run_dir / RUN_ID_FILE).exists()
    sink.open()
    store = MlflowClient(f"http://127.0.0.1:{mlflow_server}")
    experiment = store.get_experiment_by_name("lost answers")
    assert experiment is not None
    assert len(store.search_runs([experiment.experiment_id])) == 1
    assert (run.run_dir / RUN_ID_FILE).read_text().strip() == sink.run_id


def assert_each_outage_is_reported_once(lines: list[str]) -> None:
    """Check that start and end of each outage have one line. A busy machine may have more than the two outages.

    The end of the run has two lines, and two more if points are undelivered.
    """
    messages = [line for line in lines if "retrying" in line or "reachable again" in line]
    assert len(messages) >= 4, lines
    assert all("retrying" in line for line in messages[::2]), lines
    assert all("reachable again" in line for line in messages[1::2]), lines
    others = [line for line in lines if line not in messages]
    assert len(others) == len(set(others)) <= 4, lines


def test_outage_loses_and_duplicates_no_points_and_a_running_run_is_locked(
    cifar_exp: Command,
    workplace: Path,
    relay: Relay,  # noqa: F811
    mlflow_server: int,
) -> None:
    run = [*SLOW, f"tracking.uri={relay.address}", "tracking.experiment=outage", "hydra.run.dir=run"]
    store = MlflowClient(f"http://127.0.0.1:{mlflow_server}")
    with (workplace / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "cifar_exp", *run, "progress=quiet"],
            cwd=workplace,
            env=environment(),
            stderr=errors,
            text=True,
        )
    try:
        wait_for(lambda: (workplace / "run" / RUN_ID_FILE).exists(), process)
        identity = (workplace / "run" / RUN_ID_FILE).read_text().strip()
        wait_for(lambda: "step/loss" in store.get_run(identity).data.metrics, process)
        for mode in ("cut", "hang"):
            count = (workplace / "errors").read_text().count("retrying")
            relay.turn(mode)
            wait_for(lambda count=count: (workplace / "errors").read_text().count("retrying") > count, process)
            relay.turn("pass")
            wait_for(
                lambda count=count: (workplace / "errors").read_text().count("reachable again") > count,
                process,
            )
        for refused in (cifar_exp(*run, "resume=auto"), cifar_exp("sync", "run", f"tracking.uri={relay.address}")):
            assert refused.returncode == 2
            assert f"(process {process.pid} on " in refused.stderr
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        listening = {c.laddr.ip for one in family for c in one.net_connections() if c.status == psutil.CONN_LISTEN}
        assert listening <= {"127.0.0.1"}
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
    finally:
        process.kill()
    assert_each_outage_is_reported_once((workplace / "errors").read_text().splitlines())
    done = cifar_exp("sync", "run", f"tracking.uri={relay.address}")  # deliver the rest
    assert done.returncode == 0, done.stderr
    record = store.get_run(identity)
    assert record.info.status == "KILLED"
    assert points(store, identity, workplace / "run") == written(workplace / "run")
    assert len(store.search_runs([record.info.experiment_id])) == 1


def test_next_start_closes_runs_of_dead_processes_only(
    cifar_exp: Command, started: Start, workplace: Path, store: Path
) -> None:
    sweep = started("-m", *SLOW, "seed=1,2")
    wait_for(lambda: list((workplace / "outputs").glob(f"multirun/*/*/0/{RUN_ID_FILE}")), sweep)
    wait_for_tracked_runs(sweep, store, 2)
    other = cifar_exp(*TINY, "train.epochs=1", "progress=quiet")
    assert other.returncode == 0, other.stderr
    assert sorted(run.info.status for run in all_runs(client())) == ["FINISHED", "RUNNING", "RUNNING"]
    sweep.kill()
    sweep.wait()
    mlflow = client()
    experiment = all_runs(mlflow)[0].info.experiment_id

    def run_of_owner(name: str, **changes: str) -> str:
        folder = workplace / "outputs" / name
        folder.mkdir()
        tags = {f"process.{key}": value for key, value in changes.items()}
        identity = mlflow.create_run(experiment, tags=owner_tags(folder) | tags, run_name=name).info.run_id
        (folder / RUN_ID_FILE).write_text(identity)
        return str(identity)

    living = run_of_owner("living")
    elsewhere = run_of_owner("elsewhere", host="another", boot_id="x")
    container = run_of_owner("container", pid_namespace="pid:[1]", pid="1")
    killed_there = run_of_owner("killed-there", host="another", pid_namespace="pid:[1]", pid="1")
    training_there = run_of_owner("training-there", host="another", pid_namespace="pid:[1]", pid="1")
    for name in ("elsewhere", "killed-there", "training-there"):
        (workplace / "outputs" / name / LOCK_FILE).touch()
    held = lock_run_folder(workplace / "outputs" / "training-there")
    reused = run_of_owner("reused", pid_started="1")
    rebooted = run_of_owner("rebooted", boot_id="an earlier one")
    finished = run_of_owner("finished", boot_id="an earlier one")
    Outcome("FINISHED", 1_700_000_000.5).save(workplace / "outputs" / "finished")
    (workplace / "outputs" / "finished" / UNDELIVERED_FILE).touch()
    next_start = cifar_exp(*TINY, "train.epochs=1", "progress=quiet")
    assert next_start.returncode == 0, next_start.stderr
    held.release()
    assert next_start.stderr.count("cifar-exp sync") == 2
    assert re.search(r"If it has ended, run (uv run )?cifar-exp sync outputs/elsewhere", next_start.stderr)
    assert "cifar-exp sync outputs/finished" in next_start.stderr
    status = {run.info.run_id: run.info.status for run in all_runs(mlflow)}
    expected = {living: "RUNNING", elsewhere: "RUNNING", container: "RUNNING"}
    expected |= {
        killed_there: "KILLED",
        training_there: "RUNNING",
        reused: "KILLED",
        rebooted: "KILLED",
        finished: "FINISHED",
    }
    assert {identity: status.pop(identity) for identity in expected} == expected
    assert sorted(status.values()) == ["FINISHED", "FINISHED", "KILLED", "KILLED"]  # the sweep and its job are KILLED
    assert mlflow.get_run(finished).info.end_time == 1_700_000_000_500


@linux
def test_owner_is_dead_only_if_certain() -> None:
    here = Owner.here()
    assert not here.is_gone()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    theirs = Owner(here.host, here.boot_id, here.pid_namespace, child.pid, fields[19])
    assert not theirs.is_gone()
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert theirs.is_gone()  # a zombie
    child.wait()
    assert theirs.is_gone()
    assert str(theirs).startswith(f"process {child.pid} on {os.uname().nodename}")


def test_run_trained_during_an_outage_is_delivered_completely_later(
    cifar_exp: Command,
    workplace: Path,
    relay: Relay,  # noqa: F811
    mlflow_server: int,
) -> None:
    """The server accepts requests and never answers."""
    relay.turn("hang")
    address = f"tracking.uri={relay.address.replace('//', '//me:secret-word@')}"
    began = time.monotonic()
    done = cifar_exp(*TINY, address, "tracking.experiment=never heard of", "seed=3")
    assert time.monotonic() - began < 120
    assert done.returncode == 5
    assert "Traceback" not in done.stderr
    folder = the_run(workplace)
    typed = (
        "sync",
        str(folder.relative_to(workplace)),
        f"tracking.uri={relay.address}",
    )  # the address must be typed: a folder's address is not trusted
    assert done.stderr.splitlines()[-1].endswith(f"cifar-exp {' '.join(typed)}")
    assert "test accuracy" in done.stdout or journal.last_values(folder)["test/count"] == 33
    assert not (folder / RUN_ID_FILE).exists()

    again = cifar_exp(*TINY, address, "tracking.experiment=never heard of", "seed=3", f"resume={folder}")
    assert again.returncode == 5  # trained, but still undelivered
    assert "finished before, test accuracy" in again.stdout
    refused = cifar_exp("sync", str(folder))
    assert refused.returncode == 2
    assert f"If it is your store, run cifar-exp sync {folder} {typed[-1]}" in refused.stderr
    refused = cifar_exp(*typed)
    assert refused.returncode == 5
    assert "Nothing is lost" in refused.stderr
    relay.turn("pass")
    delivered = cifar_exp(*TINY, address, "tracking.experiment=never heard of", "seed=3", f"resume={folder}")
    assert delivered.returncode == 0, delivered.stderr
    count = sum(written(folder).values())
    assert f"{count} of {count} points were missing and are now delivered, 5 files, FINISHED" in delivered.stdout
    again = cifar_exp("sync", "outputs", typed[-1])
    assert again.returncode == 0, again.stderr
    assert f" 0 of {count} points" in again.stdout
    assert "secret-word" not in done.stdout + done.stderr + refused.stderr + delivered.stdout + again.stdout

    store = MlflowClient(f"http://127.0.0.1:{mlflow_server}")
    identity = (folder / RUN_ID_FILE).read_text().strip()
    record = store.get_run(identity)
    assert record.info.status == "FINISHED"
    assert record.data.params["seed"] == "3"
    assert record.data.tags["devices"] == "1"
    assert points(store, identity, folder) == written(folder)
    kept = {artifact.path for artifact in store.list_artifacts(identity)}
    assert kept == {"config.yaml", "progress.html", "training.png", "metrics.jsonl", "model.safetensors"}
    saved = json.loads((folder / "run.json").read_text())
    assert record.info.start_time == round(saved["started"] * 1000)
    assert abs(record.info.end_time / 1000 - saved["started"]) < 120


def test_sync_delivers_a_whole_sweep_to_another_store(cifar_exp: Command, workplace: Path) -> None:
    done = cifar_exp("-m", *TINY, "devices.count=1,2", "devices.oversubscribe=false", "train.epochs=1")
    assert done.returncode == 0, done.stderr
    (folder,) = (workplace / "outputs").glob("multirun/*/*")
    shutil.move(workplace / "outputs" / "mlflow.db", workplace / "lost.db")
    other = f"sqlite:///{workplace / 'other.db'}"
    delivered = cifar_exp("sync", str(folder / "1"), f"tracking.uri={other}")
    assert delivered.returncode == 0, delivered.stderr
    assert len(delivered.stdout.splitlines()) == 2  # the job and its sweep
    delivered = cifar_exp("sync", str(folder), f"tracking.uri={other}")
    assert delivered.returncode == 0, delivered.stderr
    store = MlflowClient(other)
    runs = all_runs(store)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    assert [run.data.tags.get("mlflow.parentRunId") for run in runs].count(parent.info.run_id) == 2
    speedup = store.get_metric_history(parent.info.run_id, "speedup")
    assert sorted(point.step for point in speedup) == [1, 2]
    files = {file.path for file in store.list_artifacts(parent.info.run_id)}
    assert files == {"speedup.csv", "speedup.png", "speedup.html"}
    assert parent.data.tags["devices"] == "1,2"
    for wrong, message in {
        ("nowhere",): "there is no run in this folder",
        (str(folder), "tracking.url=x"): "Set tracking.uri=... or tracking.experiment=...",
        (str(folder), "tracking.uri=ftp://x"): "it must begin with one of",
    }.items():
        refused = cifar_exp("sync", *wrong)
        assert refused.returncode == 2
        assert message in refused.stderr
