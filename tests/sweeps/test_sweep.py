"""Sweeps: one parent run, a child run per job, failed jobs that do not end the sweep, and the speedup table."""

import csv
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TINY, Command
from tests.helpers.commands import ForkedCommand
from tests.helpers.marks import pinning
from tests.helpers.mlflow_runs import all_runs, client

Start = Callable[..., ForkedCommand]


def test_device_counts_end_in_a_speedup_table_and_a_bad_job_does_not_end_the_sweep(
    cifar_exp: Command, workplace: Path
) -> None:
    done = cifar_exp("-m", *TINY, "devices.count=1,2", "model.depth=1,0", "train.epochs=1")
    assert done.returncode == 2  # the first failure's
    assert "Traceback" not in done.stderr
    assert done.stderr.count("model.depth=0: it must be 1 or more") == 2
    store = client()
    runs = all_runs(store)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert parent.info.status == "FAILED"
    assert [run.info.status for run in children] == ["FINISHED", "FINISHED"]
    assert {run.data.tags["sweep"] for run in runs} == {parent.data.tags["sweep"]}

    (table,) = (workplace / "outputs" / "multirun").rglob("speedup.csv")
    rows = list(csv.DictReader(table.open()))
    rates = {int(run.data.tags["devices"]): run.data.metrics["steady_images_per_second"] for run in children}
    assert [(int(row["devices"]), int(row["global_batch_size"])) for row in rows] == [(1, 32), (2, 64)]
    assert float(rows[1]["speedup"]) == pytest.approx(rates[2] / rates[1])
    assert float(rows[1]["efficiency"]) == pytest.approx(rates[2] / rates[1] / 2)
    points = {point.step: point.value for point in store.get_metric_history(parent.info.run_id, "speedup")}
    assert points == pytest.approx({1: 1.0, 2: rates[2] / rates[1]})
    for metric in ("efficiency", "images_per_second", "test/accuracy", "time/train_seconds"):
        assert [point.step for point in store.get_metric_history(parent.info.run_id, metric)] == [1, 2]
    kept = {file.path for file in store.list_artifacts(parent.info.run_id)}
    assert kept == {"speedup.csv", "speedup.png", "speedup.html"}
    assert "CPU-simulated" in done.stdout

    again = cifar_exp("report", parent.info.run_id, "--to", "again")
    assert again.returncode == 0, again.stderr
    assert (workplace / "again" / "speedup.csv").read_text() == table.read_text()
    assert (workplace / "again" / "speedup.png").stat().st_size > 1000

    options = ["--to", "folder", "report.target_accuracy=0.01", "report.price_per_hour=3600"]
    folder = cifar_exp("report", str(table.parent), *options)
    assert folder.returncode == 0, folder.stderr
    priced = list(csv.DictReader((workplace / "folder" / "speedup.csv").open()))
    assert [row["speedup"] for row in priced] == [row["speedup"] for row in rows]
    for row in priced:
        assert row["reached"] == "1"
        seconds = float(row["seconds_to_accuracy"])
        assert float(row["device_seconds_to_accuracy"]) == pytest.approx(seconds * int(row["devices"]))
        assert float(row["price_to_accuracy"]) == pytest.approx(seconds * int(row["devices"]))

    both = cifar_exp("report", str(table.parent), parent.info.run_id, "--to", "both")
    assert both.returncode == 0, both.stderr
    compared = list(csv.DictReader((workplace / "both" / "comparison.csv").open()))
    assert [(row["devices"], row["figure"]) for row in compared[:3]] == [
        ("1", figure) for figure in ("images_per_second", "train_seconds", "test_accuracy")
    ]
    assert all(row["first"] == row["second"] for row in compared)  # the folder and the store say the same

    wrong = cifar_exp("report", str(table.parent), "report.target_accuracy=85")
    assert wrong.returncode == 2
    assert "Set report.target_accuracy=0.85" in wrong.stderr
    (workplace / "file").write_text("of mine")
    refused = cifar_exp("report", str(table.parent), "--to", "file")
    assert refused.returncode == 8
    assert "Set --to to another folder" in refused.stderr
    away = cifar_exp("report", parent.info.run_id, "tracking.uri=http://127.0.0.1:9")
    assert away.returncode == 5
    assert "Traceback" not in away.stderr
    shutil.copytree(table.parent, table.parent.with_name("before"))
    several = cifar_exp("report", str(table.parent.parent))
    assert several.returncode == 2
    assert "there are 2 sweeps in this folder" in several.stderr
    lost = cifar_exp("report", "0123456789abcdef")
    assert lost.returncode == 2
    assert "there is no such run" in lost.stderr


@pinning
def test_the_preset_counts_the_machines_devices_and_interleaves_them(cifar_exp: Command) -> None:
    """Powers of two up to the cores, repeats slowest whatever the order they are typed in, both ways of scaling."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:2])
    limits = [word for word in TINY if not word.startswith(("devices.count", "train.epochs"))]
    wanted = ["train.scaling=weak,strong", "seed=0,1", "train.epochs=1", "report.target_accuracy=0.01"]
    try:
        done = cifar_exp("-m", "experiment=speedup", *limits, *wanted, timeout=400)
    finally:
        os.sched_setaffinity(0, cores)
    assert done.returncode == 0, done.stderr
    counts = [1, 2][: len(cores)]
    store = client()
    runs = all_runs(store)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = sorted((run for run in runs if run is not parent), key=lambda run: run.info.start_time)
    order = [[run.data.params[name] for name in ("seed", "devices.count", "train.scaling")] for run in children]
    assert order == [
        [str(seed), str(count), scaling] for seed in (0, 1) for count in counts for scaling in ("weak", "strong")
    ]
    if len(counts) == 1:
        return  # nothing to compare on one core
    for scaling, batch in (("weak", 64), ("strong", 32)):
        points = store.get_metric_history(parent.info.run_id, f"speedup/{scaling}")
        assert [point.step for point in points] == [1, 2]
        low, high = (
            store.get_metric_history(parent.info.run_id, f"speedup_{end}/{scaling}")[0] for end in ("low", "high")
        )
        assert low.step == high.step == 2
        assert low.value <= points[1].value <= high.value
        reached = store.get_metric_history(parent.info.run_id, f"time/seconds_to_accuracy/{scaling}")
        assert [point.step for point in reached] == [1, 2]
        assert all(point.value > 0 for point in reached)
        two = [run for run in children if run.data.params["train.scaling"] == scaling][-1]
        assert two.data.metrics["global_batch_size"] == batch
    for text in (
        "Student's t over 2 runs per device count",
        "Amdahl's law: serial fraction",
        "test accuracy: ",
    ):
        assert text in done.stdout


def test_a_sweep_over_anything_else_has_a_table_of_jobs_and_no_speedup(cifar_exp: Command, workplace: Path) -> None:
    done = cifar_exp("-m", *TINY, "model.width=4,8", "train.epochs=1", "tracking=none")
    assert done.returncode == 0, done.stderr
    assert "model.width=8" in done.stdout
    assert not list(workplace.rglob("speedup.csv"))
    assert len(list((workplace / "outputs" / "multirun").rglob("metrics.jsonl"))) == 2


def test_a_choice_that_does_not_exist_ends_a_sweep_before_it_begins(cifar_exp: Command, workplace: Path) -> None:
    done = cifar_exp("-m", *TINY, "model=convnet,convnt")
    assert done.returncode == 2
    assert "Did you mean convnet?" in done.stderr
    assert not list(workplace.rglob("metrics.jsonl"))


def test_two_swept_settings_make_valid_mlflow_names(cifar_exp: Command) -> None:
    done = cifar_exp("-m", *TINY, "devices.count=1,2", "train.scaling=weak,strong", "model.width=4,8", "train.epochs=1")
    assert done.returncode == 0, done.stderr
    store = client()
    (parent,) = [run for run in all_runs(store) if "mlflow.parentRunId" not in run.data.tags]
    groups = {f"{width} {scaling}" for scaling in ("weak", "strong") for width in (4, 8)}
    assert {name.partition("/")[2] for name in parent.data.metrics if name.startswith("speedup/")} == groups
    assert (parent.data.tags["devices"], parent.data.tags["accelerator"]) == ("1,2", "cpu")


def test_tracker_failure_does_not_lose_a_sweeps_result(cifar_exp: Command, workplace: Path) -> None:
    (workplace / "broken.db").write_text("this is no database")
    options = ["devices.count=1,2", "train.epochs=1", "tracking.uri=sqlite:///broken.db"]
    done = cifar_exp("-m", *TINY, *options)
    assert done.returncode == 5
    assert "Traceback" not in done.stderr
    (table,) = (workplace / "outputs" / "multirun").rglob("speedup.csv")
    assert len(list(csv.DictReader(table.open()))) == 2


@pytest.mark.usefixtures("no_store")
def test_simultaneous_runs_in_a_new_folder_share_an_intact_store(started: Start) -> None:
    processes = [started(*TINY, "train.epochs=1") for _ in range(3)]
    assert [process.communicate(timeout=200)[1] for process in processes] == ["", "", ""]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert [run.info.status for run in all_runs(client())] == ["FINISHED"] * 3


def test_failing_network_refuses_its_job_and_the_others_train(cifar_exp: Command, workplace: Path) -> None:
    """AlexNet needs larger images; its job starts no rank."""
    small = [word for word in TINY if not word.startswith("model.")]
    networks = "model._target_=torchvision.models.alexnet,torchvision.models.squeezenet1_1"
    choice = ["~model.width", "~model.depth", "train.epochs=1", "tracking=none"]
    done = cifar_exp("-m", *small, networks, *choice)
    assert done.returncode == 2
    assert "job 0 failed: model: torchvision.models.alexnet fails on 4 x 3 x 32 x 32 images" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.parent.name for path in workplace.rglob("metrics.jsonl")] == ["1"]


def test_jobs_that_would_share_a_folder_are_refused_before_the_first_one(cifar_exp: Command, workplace: Path) -> None:
    done = cifar_exp("-m", *TINY, "seed=0,1", "hydra.sweep.subdir=same", "tracking=none")
    assert done.returncode == 2
    assert "hydra.sweep.subdir=same: jobs 0 and 1 would have the same folder. Set 'hydra.sweep.subdir=" in done.stderr
    assert not list(workplace.rglob("run.json"))
