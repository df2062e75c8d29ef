"""Sweeps: one parent, a child a job, failures that do not end it, and the speedup table at the end."""

import csv
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TINY, Command
from tests.test_run import all_runs, client

Start = Callable[..., "subprocess.Popen[str]"]


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
    assert {file.path for file in store.list_artifacts(parent.info.run_id)} == {"speedup.csv", "speedup.png"}
    assert "CPU-simulated" in done.stdout

    again = cifar_exp(parent.info.run_id, "--to", "again", module="cifar_exp.report")
    assert again.returncode == 0, again.stderr
    assert (workplace / "again" / "speedup.csv").read_text() == table.read_text()
    assert (workplace / "again" / "speedup.png").stat().st_size > 1000

    lost = cifar_exp("0123456789abcdef", module="cifar_exp.report")
    assert lost.returncode == 2
    assert "there is no such run" in lost.stderr


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


def test_two_other_settings_make_groups_that_mlflow_takes(cifar_exp: Command) -> None:
    done = cifar_exp("-m", *TINY, "devices.count=1,2", "train.scaling=weak,strong", "model.width=4,8", "train.epochs=1")
    assert done.returncode == 0, done.stderr
    store = client()
    (parent,) = [run for run in all_runs(store) if "mlflow.parentRunId" not in run.data.tags]
    groups = {f"{width} {scaling}" for scaling in ("weak", "strong") for width in (4, 8)}
    assert {name.partition("/")[2] for name in parent.data.metrics if name.startswith("speedup/")} == groups
    assert (parent.data.tags["devices"], parent.data.tags["accelerator"]) == ("1,2", "cpu")


def test_a_broken_tracker_costs_a_sweep_its_record_and_not_its_result(cifar_exp: Command, workplace: Path) -> None:
    (workplace / "broken.db").write_text("this is no database")
    options = ["devices.count=1,2", "train.epochs=1", "tracking.uri=sqlite:///broken.db"]
    done = cifar_exp("-m", *TINY, *options)
    assert done.returncode == 5
    assert "Traceback" not in done.stderr
    (table,) = (workplace / "outputs" / "multirun").rglob("speedup.csv")
    assert len(list(csv.DictReader(table.open()))) == 2


def test_runs_that_start_at_once_in_a_fresh_folder_share_a_sound_store(started: Start) -> None:
    processes = [started(*TINY, "train.epochs=1") for _ in range(3)]
    assert [process.communicate(timeout=200)[1] for process in processes] == ["", "", ""]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert [run.info.status for run in all_runs(client())] == ["FINISHED"] * 3
