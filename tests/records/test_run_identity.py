"""A moved folder is the same run, and a copied folder is a separate run: a tracker never gets two runs under one id."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cifar_exp.records.journal import RUN_ID_FILE
from cifar_exp.records.run_folder import RunInfo
from cifar_exp.records.run_identity import claimed, claimed_parent_run, known_hashes, original_of
from cifar_exp.tracking.mlflow_run import MLflowRun
from cifar_exp.tracking.mlflow_tracker import MLflowTracker
from tests.helpers.mlflow_runs import all_runs, client


@pytest.fixture
def run(workplace: Path) -> RunInfo:
    """A run that a tracker knows."""
    folder = workplace / "run"
    folder.mkdir()
    made = RunInfo("a run", folder, {"lr": 0.1}, {"devices": "1"}, time.time(), sessions=("first",))
    made.save("hash")
    (folder / RUN_ID_FILE).write_text("id\n")
    return made


def renamed(folder: Path) -> Path:
    return folder.rename(folder.with_name("other"))


def moved_to_another_disk(folder: Path) -> Path:
    copy = shutil.copytree(folder, folder.with_name("other"))
    shutil.rmtree(folder)
    return copy


def restored(folder: Path) -> Path:
    backup = folder.rename(folder.with_name("backup"))
    return shutil.copytree(backup, folder)


def linked(folder: Path) -> Path:
    folder.with_name("link").symlink_to(folder)
    return folder.with_name("link")


@pytest.mark.parametrize("change", [renamed, moved_to_another_disk, restored, linked])
def test_a_folder_that_was_moved_is_the_same_run(run: RunInfo, change: Callable[[Path], Path]) -> None:
    folder = change(run.run_dir)
    for _ in range(2):
        found, original = claimed(folder, "hash")
        assert (found.key, original) == (run.key, None)
        assert (folder / RUN_ID_FILE).read_text() == "id\n"
    assert found.sessions[0] == "first"
    assert len(set(found.sessions)) == 3


def test_copied_folder_becomes_a_run_of_its_own(run: RunInfo, workplace: Path) -> None:
    copy = shutil.copytree(run.run_dir, workplace / "copy")
    found, original = claimed(copy, "hash")
    assert found.key not in ("", run.key)
    assert original == run.run_dir
    assert found.tags == {"devices": "1", "copied_from": str(run.run_dir)}
    assert not (copy / RUN_ID_FILE).exists()
    again, original = claimed(copy, "hash")
    assert (again.key, original) == (found.key, None)
    (copy / RUN_ID_FILE).write_text("0123456789abcdef" * 2)
    third, original = claimed(shutil.copytree(copy, workplace / "copy of the copy"), "hash")
    assert original == copy
    first, original = claimed(run.run_dir, "hash")
    assert (first.key, original) == (run.key, None)
    assert len({first.key, found.key, third.key}) == 3


def test_copied_sweep_gets_a_new_parent_run(workplace: Path) -> None:
    for name in ("sweep", "copy"):
        (workplace / name).mkdir()
    parent = RunInfo("sweep", workplace / "sweep", {}, {}, time.time())
    parent.save_sweep()
    shutil.copy(workplace / "sweep" / "sweep_run.json", workplace / "copy")
    assert claimed_parent_run(workplace / "sweep").key == parent.key
    assert claimed_parent_run(workplace / "copy").key != parent.key


def test_a_run_of_an_earlier_version_keeps_its_key(run: RunInfo, workplace: Path) -> None:
    path = run.run_dir / "run.json"
    content = json.loads(path.read_text())
    for name in ("place", "sessions", "config_hashes"):
        del content[name]
    path.write_text(json.dumps(content))
    assert known_hashes(run.run_dir, same_version=False) == frozenset()
    assert known_hashes(run.run_dir, same_version=True) == {"hash"}
    copy = shutil.copytree(run.run_dir, workplace / "copy")
    assert original_of(copy, content) is None
    assert claimed(run.run_dir, "newer")[0].key == run.key
    assert known_hashes(run.run_dir, same_version=False) == {"hash", "newer"}


@pytest.mark.usefixtures("store")
def test_separate_copies_do_not_share_an_mlflow_run(
    run: RunInfo, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on two machines: the one that continues second gets an MLflow run of its own."""
    (run.run_dir / RUN_ID_FILE).unlink()

    def opened(info: RunInfo) -> str | None:
        sink = MLflowRun(MLflowTracker(), info)
        sink.open()
        sink.open()  # as after a lost connection
        return sink.run_id

    first = opened(run)
    there = shutil.copytree(run.run_dir, workplace / "there")
    run = replace(run, run_dir=run.run_dir.rename(workplace / "here"))
    assert opened(claimed(there, "hash")[0]) == first
    capsys.readouterr()
    second = opened(claimed(run.run_dir, "hash")[0])
    assert second != first
    assert "a copy of it has continued its MLflow run" in capsys.readouterr().err
    assert opened(claimed(run.run_dir, "hash")[0]) == second
    assert opened(claimed(there, "hash")[0]) == first
    assert {found.info.run_id for found in all_runs(client())} == {first, second}
