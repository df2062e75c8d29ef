"""Run folders of version 0.1 can be resumed, predicted with and reported, although modules were moved since."""

import csv
import hashlib
import json
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cifar_exp.config.reading import read_config
from cifar_exp.config.result_settings import bears_on_result
from cifar_exp.config.stored import stored_config, stored_params
from cifar_exp.config.targets import FIRST_NAMES, RENAMED
from cifar_exp.data.image_reader import Preprocessing
from cifar_exp.records import checkpoint, journal
from cifar_exp.runs import resume
from cifar_exp.runs.classifier import Classifier
from cifar_exp.system.machine import description
from tests.conftest import Command
from tests.helpers.checkpoints import reseal
from tests.helpers.configs import composed

RUNS = Path(__file__).with_name("runs-of-0.1.zip")
# As typed for the runs `run` (stopped by SIGTERM after 52 of 240 steps) and `whole` (not stopped).
TYPED = [
    *("data=synthetic", "data.train_count=640", "data.test_count=64", "train.batch_size=16", "model.width=2"),
    *("model.depth=1", "devices=cpu", "devices.count=1", "train.precision=fp32", "train.deterministic=true"),
    *("train.compile=never", "progress=quiet", "augment=crop", "train.epochs=6", "tracking=none"),
]


# At their defaults in these runs: of a closed section, of an open one, and a whole section.
NEW = ["train.mirrored_evaluation", "data.num_classes", "early_stopping"]


@pytest.fixture
def runs(workplace: Path) -> Path:
    """``outputs/`` with the folders of the earlier version."""
    with zipfile.ZipFile(RUNS) as archive:
        archive.extractall(workplace / "outputs")
    return workplace / "outputs"


def test_each_renamed_target_maps_to_one_original_name() -> None:
    assert len(FIRST_NAMES) == len(RENAMED)


def test_run_of_an_earlier_version_resumes_bit_for_bit(cifar_exp: Command, runs: Path) -> None:
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
    manifest = checkpoint.newest_intact_manifest(runs / "whole", pytest.fail)
    same_machine = description("cpu", 1)["machine.processor"] == tags["machine.processor"]
    same_torch = torch.__version__.partition("+")[0] == manifest.torch.partition("+")[0]
    for name, expected in whole.items():
        if same_machine and same_torch:
            assert torch.equal(resumed[name], expected), name
        else:  # another processor or PyTorch rounds its sums otherwise
            torch.testing.assert_close(resumed[name], expected, atol=1e-2, rtol=1e-2)


def test_network_of_an_earlier_version_predicts(cifar_exp: Command, runs: Path) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32), (200, 30, 30)).save(runs.parent / "red.png")
    done = cifar_exp("predict", "outputs/whole", "--json", "red.png")
    assert done.returncode == 0, done.stderr
    saved = checkpoint.newest(runs / "whole", pytest.fail)
    assert json.loads(done.stdout)["label"] in saved.classes
    assert Classifier.of_run(runs / "whole").preprocessing == Preprocessing((32, 32), turned=False)


def test_sweep_of_an_earlier_version_has_the_same_report(cifar_exp: Command, runs: Path) -> None:
    done = cifar_exp("report", "outputs/sweep", "--to", "again")
    assert done.returncode == 0, done.stderr
    then, now = (
        list(csv.DictReader(path.open())) for path in (runs / "sweep/speedup.csv", runs.parent / "again/speedup.csv")
    )
    assert now == then


def test_changed_setting_is_reported_without_renamed_targets(cifar_exp: Command, runs: Path) -> None:
    shutil.rmtree(runs / "whole")
    done = cifar_exp(*TYPED, "resume=outputs/run", "optimizer.lr=0.05", "train.epochs=2", "progress=lines")
    assert done.returncode == 0, done.stderr
    assert "optimizer.lr: 0.1 then, 0.05 now" in done.stdout
    assert "_target_" not in done.stdout


def without(folder: Path, settings: list[str]) -> None:
    """Make the run one of a version that did not have ``settings`` yet."""
    config, info = yaml.safe_load((folder / "config.yaml").read_text()), json.loads((folder / "run.json").read_text())
    for setting in settings:
        section, _, name = setting.partition(".")
        del (config[section] if name else config)[name or section]
    info["params"] = {
        name: value
        for name, value in info["params"].items()
        if name not in settings and name.partition(".")[0] not in settings
    }
    hashed = {name: value for name, value in info["params"].items() if bears_on_result(name)}
    info["config_hash"] = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    info["config_hashes"] = [info["config_hash"]]
    (folder / "run.json").write_text(json.dumps(info))
    for manifest in folder.glob("checkpoints/*.json"):
        reseal(manifest, config_hash=info["config_hash"])


def test_config_hash_is_that_of_earlier_versions(runs: Path) -> None:
    before = json.loads((runs / "run" / "run.json").read_text())
    without(runs / "run", [])
    assert json.loads((runs / "run" / "run.json").read_text()) == before | {"config_hashes": [before["config_hash"]]}


@pytest.mark.parametrize("wanted", ["auto", "outputs/run"])
def test_a_run_from_before_a_setting_is_resumed_with_its_default(runs: Path, wanted: str) -> None:
    without(runs / "run", NEW)
    found = resume.find(read_config(composed(*TYPED, f"resume={wanted}")), Path("new"), anywhere=True, warn=pytest.fail)
    assert found
    assert found.run_dir.resolve() == (runs / "run").resolve()
    assert (found.in_place, found.changes) == (True, {})


def test_a_run_that_auto_has_chosen_is_not_chosen_by_another_start(runs: Path) -> None:
    without(runs / "run", NEW)
    config = read_config(composed(*TYPED, "resume=auto"))
    first = resume.find(config, Path("new"), anywhere=True, warn=pytest.fail)
    assert first
    assert first.lock
    assert resume.find(config, Path("other"), anywhere=True, warn=pytest.fail) is None
    first.lock.release()
    assert resume.find(config, Path("other"), anywhere=True, warn=pytest.fail)


def test_a_run_from_before_a_setting_is_not_resumed_with_another_value(runs: Path) -> None:
    without(runs / "run", NEW)
    other = [*TYPED, "train.mirrored_evaluation=true"]
    config = read_config(composed(*other, "resume=auto"))
    messages: list[str] = []
    assert resume.find(config, Path("new"), anywhere=True, warn=messages.append) is None
    (line,) = messages
    assert line.startswith("resume=auto: a new run starts. outputs/")
    assert "(train.mirrored_evaluation: false then, true now). Set them as they were to continue it, or resume=" in line
    config = read_config(composed(*other, "train.epochs=7", "resume=outputs/run"))
    found = resume.find(config, Path("new"), anywhere=True, warn=pytest.fail)
    assert found
    assert found.changes == {"train.epochs": (6, 7), "train.mirrored_evaluation": (False, True)}
    assert not found.in_place


@pytest.mark.parametrize(
    ("stored", "name", "value"),
    [
        ({"_target_": "cifar_exp.speednet.speednet", "depth": 1}, "whitening", True),  # the first name
        ({"_target_": "cifar_exp.models.networks.resnet", "width": 8}, "depth", 3),  # not convnet's, the default choice
        ({"_target_": "mine.network", "channels": 8}, "depth", None),
    ],
)
def test_a_new_setting_of_a_component_has_the_default_of_its_own_choice(
    tmp_path: Path, stored: dict[str, object], name: str, value: object
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": stored, "train": {"epochs": 3}}))
    read = stored_config(path)
    assert read["model"].get(name) == value
    assert stored.items() - {("_target_", stored["_target_"])} <= read["model"].items()
    assert (read["train"]["epochs"], read["train"]["batch_size"], read["data"]["validation"]) == (3, 256, 0.0)
    params = stored_params({f"model.{key}": part for key, part in stored.items()} | {"train.epochs": 3})
    assert {key: part for key, part in params.items() if key.startswith("model.")} == {
        f"model.{key}": part for key, part in read["model"].items()
    }
    assert (params["train.epochs"], params["train.batch_size"]) == (3, 256)


def test_removed_settings_are_no_difference(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    stored = {"_target_": "cifar_exp.datasets.cifar10", "root": "here", "size": 170498071, "sha256": "6d95"}
    path.write_text(yaml.safe_dump({"data": stored}))
    today = asdict(read_config(composed("data.root=here")))["data"]
    assert stored_config(path)["data"] == today
    params = stored_params({f"data.{name}": value for name, value in stored.items()})
    assert {name: value for name, value in params.items() if name.startswith("data.")} == {
        f"data.{name}": value for name, value in today.items()
    }
    path.write_text(yaml.safe_dump({"data": {"_target_": "mine.images", "size": 3}, "other": stored}))
    assert stored_config(path)["data"]["size"] == 3
