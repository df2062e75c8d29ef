"""An untrusted checkpoint uses no more memory than its file; a newer version's is not reported as damaged."""

import hashlib
import json
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_exp.errors import StorageError
from cifar_exp.records import checkpoint
from cifar_exp.records.checkpoint import Checkpoint
from cifar_exp.records.run_folder import CHECKPOINTS
from tests.helpers.checkpoints import position, reseal, silent

NAME = "step-00000010.pt"
WEIGHT = {"weight": torch.zeros(3)}
SOUND = Checkpoint(WEIGHT, WEIGHT, {"epoch": 7}, ("ant", "bee"), (1.0, 2.0, 3.0), (1.0, 1.0, 0.5), (16, 24))


def saved(run_dir: Path, **changes: Any) -> Path:
    """A checkpoint with changed fields, and a valid manifest for it."""
    checkpoint.save(run_dir, SOUND, position(10), keep=2)
    path = run_dir / CHECKPOINTS / NAME
    torch.save({**vars(SOUND), **changes}, path)
    return with_matching_hash(path)


def with_matching_hash(path: Path, **fields: Any) -> Path:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    reseal(path.with_suffix(".json"), **{"bytes": path.stat().st_size, "sha256": digest} | fields)
    return path


def nested() -> list[Any]:
    """2 to the power of 60 values in 60 lists."""
    value: list[Any] = []
    for _ in range(60):
        value = [value, value]
    return value


EXPANDED = torch.zeros(1).expand(2**40)
CHANGES: dict[str, dict[str, Any]] = {
    "a tensor of terabytes": {"model": OrderedDict(weight=EXPANDED)},
    "a tensor of terabytes in the optimizer": {"training": {"optimizer": {"state": {0: {"momentum": [EXPANDED]}}}}},
    "a meta tensor": {"model": {"weight": torch.empty(2**40, device="meta")}},
    "a sparse tensor": {
        "model": {"weight": torch.sparse_coo_tensor(torch.zeros(1, 0), torch.zeros(0), (2**40,), check_invariants=True)}
    },
    "no state": {"model": [1]},
    "names that are none": {"trained": {1: torch.zeros(1)}},
    "no classes": {"classes": ()},
    "classes that are numbers": {"classes": (1, 2)},
    "classes that are one text": {"classes": "abc"},
    "too many classes": {"classes": ("a",) * 100_001},
    "two channels": {"shift": (1.0, 2.0)},
    "a scale of texts": {"scale": ("a", "b", "c")},
    "a huge image": {"image_size": (10**6, 10**6)},
    "an image of nothing": {"image_size": (0, 32)},
    "no training": {"training": None},
    "no preprocessing": {"preprocessing": [1]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_contents_of_a_checkpoint_are_checked_before_use(tmp_path: Path, change: str) -> None:
    saved(tmp_path, **CHANGES[change])
    with pytest.raises(StorageError, match=rf"{NAME}: the checkpoint cannot be read: ") as refusal:
        checkpoint.newest(tmp_path, silent)
    (field,) = CHANGES[change]
    assert field in str(refusal.value) or "a tensor claims" in str(refusal.value)


def test_values_shared_by_many_lists_are_checked_once(tmp_path: Path) -> None:
    saved(tmp_path, training={"nested": nested()})
    assert len(checkpoint.newest(tmp_path, silent).training["nested"]) == 2


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    torch.save({name: value for name, value in vars(SOUND).items() if name != "classes"}, path)
    with_matching_hash(path)
    with pytest.raises(StorageError, match=r"cannot be read: it has no classes"):
        checkpoint.newest(tmp_path, silent)


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path: Path) -> None:
    """20 MB of zeros in 20 kB: ``torch.load`` would unpack it."""
    path = saved(tmp_path, model={"weight": torch.zeros(5_000_000)})
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert with_matching_hash(path).stat().st_size < 100_000
    assert torch.load(path, weights_only=True)["model"]["weight"].shape == (5_000_000,)
    with pytest.raises(StorageError, match="it is compressed"):
        checkpoint.newest(tmp_path, silent)


def test_entries_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        twin = archive.infolist()[0]
        archive.filelist += [twin] * 1000
        archive._didModify = True
    with_matching_hash(path)
    with pytest.raises(StorageError, match="claim to be larger than the file"):
        checkpoint.newest(tmp_path, silent)


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"PK\x05\x06" + bytes(18)], ids=["empty", "text", "empty zip"])
def test_file_that_is_not_a_checkpoint_is_refused_with_one_message(tmp_path: Path, content: bytes) -> None:
    path = saved(tmp_path)
    path.write_bytes(content)
    with_matching_hash(path)
    with pytest.raises(StorageError, match=rf"{NAME}: the checkpoint cannot be read: "):
        checkpoint.newest(tmp_path, silent)


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with path.open("r+b") as file:
        file.truncate(2**40)
    messages: list[str] = []
    reseal(path.with_suffix(".json"), bytes=2**40)
    with pytest.raises(StorageError, match="all 1 checkpoint"):
        checkpoint.newest(tmp_path, messages.append)
    assert "bytes are read" in messages[0] or "are read" in messages[0]


@pytest.mark.parametrize(
    "change",
    [{"file": "../../x"}, {"file": "/etc/passwd"}, {"file": ".."}, {"file": 3}, {"step": "ten"}, {"best_step": [1]}],
    ids=str,
)
def test_manifest_with_wrong_types_is_skipped(tmp_path: Path, change: dict[str, Any]) -> None:
    path = saved(tmp_path)
    reseal(path.with_suffix(".json"), **change)
    messages: list[str] = []
    with pytest.raises(StorageError, match="all 1 checkpoint"):
        checkpoint.newest(tmp_path, messages.append)
    assert "step-00000010.json: the checkpoint cannot be read and is skipped: " in messages[0]


@pytest.mark.parametrize(
    ("content", "why"),
    [("[" * 100_000, "nested too deeply"), *((text, "holds no fields") for text in ("[1, 2]", "5", "null", '"file"'))],
    ids=lambda text: text[:10],
)
def test_a_manifest_without_fields_is_skipped(tmp_path: Path, content: str, why: str) -> None:
    path = saved(tmp_path)
    path.with_suffix(".json").write_text(content)
    messages: list[str] = []
    with pytest.raises(StorageError, match="all 1 checkpoint"):
        checkpoint.newest(tmp_path, messages.append)
    assert why in messages[0]


def test_manifest_of_a_newer_version_is_reported_as_such(tmp_path: Path) -> None:
    """An older checkpoint is not used instead, because the steps after it would be lost."""
    checkpoint.save(tmp_path, SOUND, replace(position(5), epoch=0), keep=2)
    path = saved(tmp_path)
    reseal(path.with_suffix(".json"), cifar_exp="9.1.0", shards=4)
    with pytest.raises(StorageError) as refusal:
        checkpoint.newest(tmp_path, silent)
    assert "damaged" not in str(refusal.value)
    assert "a newer version of cifar-exp wrote the checkpoint (9.1.0, and this is " in str(refusal.value)
    assert "it has shards. Install that version" in str(refusal.value)


def test_checkpoint_of_a_newer_version_is_reported_as_such(tmp_path: Path) -> None:
    path = saved(tmp_path, ema_steps=3)
    reseal(path.with_suffix(".json"), cifar_exp="9.1.0")
    with pytest.raises(StorageError, match=r"\(9\.1\.0, and this is .*\): it has ema_steps\. Install that version"):
        checkpoint.newest(tmp_path, silent)
    assert json.loads(path.with_suffix(".json").read_text())["cifar_exp"] == "9.1.0"
