"""A new run overwrites no files, and does not use another program's file as its lock."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cifar_exp.errors import ConfigError, StorageError
from cifar_exp.records.run_folder import LOCK_FILE, RunInfo, lock_run_folder
from cifar_exp.runs.locked_folder import locked_run_folder
from cifar_exp.runs.prepare import ARTIFACTS
from tests.helpers.configs import default_config


def start(folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    info = RunInfo("a run", folder, {}, {}, time.time(), ARTIFACTS)
    return SimpleNamespace(info=info, is_new=True, resumed=None, folder=folder, config_hash="hash")


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "progress.html", "training.png", "model.safetensors", "outcome.json"]
)
def test_a_file_with_the_name_of_a_runs_file_is_not_overwritten(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text("mine")
    with (
        pytest.raises(ConfigError, match=rf"the folder has {name}, which the run would overwrite or add to"),
        locked_run_folder(start(folder), default_config()),
    ):
        pass
    assert (folder / name).read_text() == "mine"
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="it is a link"), locked_run_folder(start(folder), default_config()):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_start_killed_before_training_can_be_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with locked_run_folder(start(folder), default_config()):
        pass
    (folder / "run.json").unlink()
    with locked_run_folder(start(folder), default_config()) as run:
        assert len(run.sessions) == 1
    with pytest.raises(ConfigError, match="has a run already"), locked_run_folder(start(folder), default_config()):
        pass


def test_a_file_with_the_name_of_the_lock_keeps_its_content(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("mine")
    lock_run_folder(tmp_path).release()
    assert (tmp_path / LOCK_FILE).read_text() == "mine"
    (tmp_path / LOCK_FILE).unlink()
    for _ in range(2):
        lock_run_folder(tmp_path).release()
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"]
    (tmp_path / LOCK_FILE).rename(tmp_path / "elsewhere")
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_text()
    with pytest.raises(StorageError, match="it is a link"):
        lock_run_folder(tmp_path)
    assert (tmp_path / "elsewhere").read_text() == before
