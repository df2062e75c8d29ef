"""`hydra/sweeper=search` as a command: trials, parent run, side by side, and a search that is killed and continued."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cifar_exp.records import journal
from tests.conftest import TINY, Command
from tests.helpers.commands import ForkedCommand
from tests.helpers.mlflow_runs import all_runs, client
from tests.helpers.processes import wait_for

pytest.importorskip("optuna", reason="needs the package optuna (the extra cifar-exp[search])")
Start = Callable[..., ForkedCommand]
SEARCH = ["-m", "hydra/sweeper=search", *TINY, "data.validation=0.25", "optimizer.lr=tag(log,interval(0.01,1))"]
SEARCH += ["model.width=2,4"]


def rows(workplace: Path) -> list[dict[str, str]]:
    (table,) = (workplace / "outputs" / "multirun").rglob("search.csv")
    return list(csv.DictReader(table.open()))


def test_a_search_is_a_parent_run_with_a_child_per_trial_and_ends_with_the_best_command_line(
    cifar_exp: Command, workplace: Path
) -> None:
    done = cifar_exp(*SEARCH, "hydra.sweeper.n_trials=3", "hydra.sweeper.pruner=none")
    assert done.returncode == 0, done.stderr
    store = client()
    runs = all_runs(store)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert [run.info.status for run in (parent, *children)] == ["FINISHED"] * 4
    found = rows(workplace)
    for row, child in zip(found, sorted(children, key=lambda run: run.info.start_time), strict=True):
        assert row["result"] == "done"
        assert float(row["val_accuracy"]) == pytest.approx(child.data.metrics["val/accuracy"])
        assert float(row["test_accuracy"]) == pytest.approx(child.data.metrics["test/accuracy"])
        assert float(row["optimizer.lr"]) == float(child.data.params["optimizer.lr"])
        assert row["model.width"] == child.data.params["model.width"]
    points = store.get_metric_history(parent.info.run_id, "search/val_accuracy")
    assert [point.step for point in points] == [0, 1, 2]
    assert [point.value for point in points] == pytest.approx([float(row["val_accuracy"]) for row in found])
    assert [file.path for file in store.list_artifacts(parent.info.run_id)] == ["search.csv"]
    best = max(found, key=lambda row: (float(row["val_accuracy"]), -int(row["trial"])))
    assert f"best: trial {best['trial']}, validation accuracy {float(best['val_accuracy']):.4f}" in done.stdout
    assert re.search(rf"run it: .*cifar-exp .* optimizer\.lr={re.escape(best['optimizer.lr'])} model", done.stdout)


def test_a_search_without_validation_images_or_with_a_wrong_value_is_refused_and_leaves_nothing(
    cifar_exp: Command, workplace: Path
) -> None:
    for wrong, message in (
        ("data.validation=0.0", "The test images must not choose anything. Set data.validation=0.1"),
        ("model.depth=1,0", "model.depth=0: it must be 1 or more"),
        ("hydra.sweeper.n_trials=0", "hydra.sweeper.n_trials=0: it must be 1 or more"),
        ("hydra.sweeper.n_jobs=2", "Set it, too, or start the same command several times"),
    ):
        done = cifar_exp(*SEARCH, wrong)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not (workplace / "outputs" / "multirun").exists()
    assert all_runs(client()) == []


def test_failed_trials_do_not_end_the_search_and_give_it_their_exit_code(cifar_exp: Command, workplace: Path) -> None:
    done = cifar_exp(*SEARCH, "optimizer.lr=1e30,1e31", "hydra.sweeper.n_trials=2", "tracking=none")
    assert done.returncode == 6, done.stderr
    assert [(row["trial"], row["result"], row["val_accuracy"]) for row in rows(workplace)] == [
        ("0", "failed", ""),
        ("1", "failed", ""),
    ]
    assert all("training has diverged" in row["reason"] for row in rows(workplace))
    assert "no trial completed" in done.stdout


@pytest.mark.long
def test_a_killed_search_continues_its_trial_and_a_finished_one_gets_more_trials(
    started: Start, cifar_exp: Command, workplace: Path
) -> None:
    words = [*SEARCH, "tracking=none", "hydra.sweeper.pruner=none", "hydra.sweeper.n_trials=2", "train.epochs=300"]
    search = started(*words)
    folder = workplace / "outputs" / "multirun"
    wait_for(lambda: list(folder.rglob("checkpoints/*")), search)
    search.kill()
    search.wait(30)
    again = cifar_exp(*words, "resume=auto")
    assert again.returncode == 0, again.stderr
    found = rows(workplace)
    assert [(row["trial"], row["result"]) for row in found] == [("0", "done"), ("1", "done")]
    (first,) = folder.rglob("0/metrics.jsonl")
    steps = [entry.step for entry in journal.read(first.parent) if "val/accuracy" in entry.metrics]
    assert steps == sorted(set(steps))
    assert len(steps) == 300
    assert "continues after step" in again.stdout or "resum" in again.stdout.lower()

    more = cifar_exp(*words, f"resume={first.parents[1]}", "hydra.sweeper.n_trials=3")
    assert more.returncode == 0, more.stderr
    assert [row["trial"] for row in rows(workplace)] == ["0", "1", "2"]
    assert rows(workplace)[:2] == found
