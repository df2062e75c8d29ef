"""Run folders of version 0.1, from before files moved into folders, are resumed, predicted with and reported."""

import csv
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cifar_exp.config.targets import FIRST_NAMES, RENAMED
from cifar_exp.records import checkpoint, journal
from cifar_exp.system.machine import description
from tests.conftest import Command

RUNS = Path(__file__).with_name("runs-of-0.1.zip")
# As typed for the runs `run` (stopped by SIGTERM after 52 of 240 steps) and `whole` (not stopped).
TYPED = [
    *("data=synthetic", "data.train_count=640", "data.test_count=64", "train.batch_size=16", "model.width=2"),
    *("model.depth=1", "devices=cpu", "devices.count=1", "train.precision=fp32", "train.deterministic=true"),
    *("train.compile=never", "progress=quiet", "augment=crop", "train.epochs=6", "tracking=none"),
]


@pytest.fixture
def runs(workplace: Path) -> Path:
    """``outputs/`` with the folders of the earlier version."""
    with zipfile.ZipFile(RUNS) as archive:
        archive.extractall(workplace / "outputs")
    return workplace / "outputs"


def test_every_renamed_target_has_one_first_name() -> None:
    assert len(FIRST_NAMES) == len(RENAMED)


def test_a_run_is_resumed_where_it_was_stopped_and_ends_as_one_that_was_not(cifar_exp: Command, runs: Path) -> None:
    before = journal.read(runs / "run")
    saved = checkpoint.newest(runs / "run", pytest.fail)
    done = cifar_exp(*TYPED, "resume=auto")
    assert (done.returncode, done.stderr) == (0, "")
    entries = journal.read(runs / "run")
    assert entries[: len(before) - 1] == before[: len(before) - 1]
    assert (saved.training["step"], entries[-1].step, entries[-1].epoch) == (52, 240, 6)
    assert not [
        path for path in runs.iterdir() if path.name not in ("run", "whole", "sweep", "mlflow.db", "mlflow.db.lock")
    ]
    resumed, whole = (load_file(runs / name / "model.safetensors") for name in ("run", "whole"))
    assert resumed.keys() == whole.keys()
    tags = json.loads((runs / "whole" / "run.json").read_text())["tags"]
    same_machine = description("cpu", 1)["machine.processor"] == tags["machine.processor"]
    for name, expected in whole.items():
        if same_machine:
            assert torch.equal(resumed[name], expected), name
        else:  # another processor rounds its sums otherwise
            torch.testing.assert_close(resumed[name], expected, atol=1e-2, rtol=1e-2)


def test_its_network_labels_images(cifar_exp: Command, runs: Path) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32), (200, 30, 30)).save(runs.parent / "red.png")
    done = cifar_exp("predict", "outputs/whole", "--json", "red.png")
    assert done.returncode == 0, done.stderr
    saved = checkpoint.newest(runs / "whole", pytest.fail)
    assert json.loads(done.stdout)["label"] in saved.classes


def test_its_sweep_is_reported_as_it_was(cifar_exp: Command, runs: Path) -> None:
    done = cifar_exp("report", "outputs/sweep", "--to", "again")
    assert done.returncode == 0, done.stderr
    then, now = (
        list(csv.DictReader(path.open())) for path in (runs / "sweep/speedup.csv", runs.parent / "again/speedup.csv")
    )
    assert now == then


def test_a_changed_setting_is_told_without_the_names_that_only_moved(cifar_exp: Command, runs: Path) -> None:
    shutil.rmtree(runs / "whole")
    done = cifar_exp(*TYPED, "resume=outputs/run", "optimizer.lr=0.05", "train.epochs=2", "progress=lines")
    assert done.returncode == 0, done.stderr
    assert "optimizer.lr: 0.1 then, 0.05 now" in done.stdout
    assert "_target_" not in done.stdout
