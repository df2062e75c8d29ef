"""`model.safetensors` is the network of the run, and the lines in docs/networks.md are all that it takes to use it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from cifar_exp.errors import StorageError
from cifar_exp.models.networks import convnet
from cifar_exp.records import checkpoint
from cifar_exp.records.model_export import publish
from cifar_exp.runs.classifier import Classifier
from tests.conftest import TINY, Command
from tests.helpers.checkpoints import position, silent, trained
from tests.helpers.readme import NETWORKS, folders

CONVNET = {"_target_": "cifar_exp.models.networks.convnet", "width": 4, "depth": 1}


def in_plain_pytorch(run_dir: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the lines leave, run in the run's folder."""
    (code,) = re.findall(r"```python\n(.*?)```", NETWORKS, re.DOTALL)
    names: dict[str, Any] = {"images": images}
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.chdir(run_dir)
        exec(code, names)
    return names


def test_the_lines_of_the_docs_give_the_logits_of_the_trained_network(
    cifar_exp: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders(workplace / "pictures")
    small = [word for word in TINY if not word.startswith(("data", "train.batch_size"))]
    options = ["train.batch_size=16", "train.normalization=zscore", "data.validation=0.2", "checkpoint.every=5"]
    done = cifar_exp(*small, "data=folders", "data.root=pictures", *options, "tracking=none", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = in_plain_pytorch(workplace / "run", images, monkeypatch)
    about = plain["about"]
    assert about["classes"] == ["ant", "bee", "cow"]
    assert about["image_size"] == [32, 32]
    assert plain["settings"] == {"width": 4, "depth": 1}
    assert plain["network"] is convnet

    classifier = Classifier.of_run(workplace / "run", "best")
    assert list(classifier.normalization.shift) == about["shift"]
    for name, value in classifier.model.state_dict().items():
        assert torch.equal(value, plain["weights"][name]), name
    with torch.inference_mode():
        same_input = (images - plain["shift"]) * plain["scale"]
        assert torch.equal(plain["logits"], classifier.model(same_input))
        torch.testing.assert_close(plain["logits"], classifier.model(classifier.normalization(images)))
    assert plain["logits"].std() > 0.001
    assert not list((workplace / "run").glob("*tmp"))
    assert_files_are_read_alike(plain["read"], classifier, workplace)

    best = checkpoint.best(workplace / "run", pytest.fail)
    assert best is not None
    assert about["epoch"] == best.training["epoch"]


def assert_files_are_read_alike(read: Callable[[Path], torch.Tensor], classifier: Classifier, folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, (mode, size) in enumerate([("RGB", (32, 32)), ("L", (70, 33)), ("RGBA", (20, 90)), ("CMYK", (64, 48))]):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        path = folder / f"{mode}.tif" if mode == "CMYK" else folder / f"{mode}.png"
        Image.fromarray(pixels).convert(mode).save(path, exif=exif)
        assert torch.equal(read(path), classifier.read(path)), mode


@pytest.mark.parametrize(
    "target",
    ["os.mkdir", "torch.utils.collect_env.run", "cifar_exp.models.build.seeded", "cifar_exp.models.networks.nn", "", 3],
)
def test_the_lines_of_the_docs_import_nothing_that_a_file_names(
    tmp_path: Path, target: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, trained(), position(10), keep=1)
    publish(tmp_path, {"_target_": target, "path": "executed"}, silent)
    with pytest.raises(KeyError):
        in_plain_pytorch(tmp_path, torch.zeros(1, 3, 16, 24), monkeypatch)
    assert not (tmp_path / "executed").exists()


def test_the_lines_of_the_docs_take_no_more_memory_than_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, trained(), position(10), keep=1)
    publish(tmp_path, CONVNET | {"width": 1_000_000}, silent)
    with pytest.raises(RuntimeError, match="size mismatch"):
        in_plain_pytorch(tmp_path, torch.zeros(1, 3, 16, 24), monkeypatch)


@pytest.mark.parametrize("length", [2**60, 2**63, 10**8 + 1, 0])
def test_a_header_of_any_claimed_length_is_refused_by_those_lines(
    tmp_path: Path, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" * 10)
    with pytest.raises(SafetensorError):
        in_plain_pytorch(tmp_path, torch.zeros(1, 3, 16, 24), monkeypatch)


def test_a_tensor_that_claims_terabytes_is_refused_by_those_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = {"w": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}
    text = json.dumps(header | {"__metadata__": {"model": json.dumps(CONVNET)}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    with pytest.raises(SafetensorError):
        in_plain_pytorch(tmp_path, torch.zeros(1, 3, 16, 24), monkeypatch)


def test_channels_last_and_shared_weights_are_published_as_they_are(tmp_path: Path) -> None:
    saved = trained()
    weights = {name: value for name, value in saved.model.items() if value.ndim == 4}
    name, kernel = next(iter(weights.items()))
    model = dict(saved.model) | {name: kernel.to(memory_format=torch.channels_last), "tied": kernel}
    checkpoint.save(tmp_path, checkpoint.Checkpoint(**{**vars(saved), "model": model}), position(10), keep=1)
    settings = {"_target_": "cifar_exp.models.networks.convnet", "width": 4, "list": [1, None, "żaba"]}
    with safe_open(publish(tmp_path, settings, silent), "pt") as file:
        about = {key: json.loads(text) for key, text in file.metadata().items()}
        assert about["model"] == settings
        assert about["classes"] == list(saved.classes)
        assert (about["shift"], about["scale"]) == (list(saved.shift), list(saved.scale))
        assert about["epoch"] == 7
        assert set(file.keys()) == set(model)
        for key, value in model.items():
            assert torch.equal(file.get_tensor(key), value)


def test_a_network_that_cannot_be_published_is_a_storage_error(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, trained(), position(10), keep=1)
    (tmp_path / "model.safetensors" / "in the way").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"model\.safetensors cannot be written: .*Free space"):
        publish(tmp_path, {"_target_": "x"}, silent)
    assert not list(tmp_path.glob("*tmp"))
