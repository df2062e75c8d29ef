"""A saved network comes back bit for bit, or in one message that says which file; nothing in a file is executed."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_exp import checkpoint
from cifar_exp.checkpoint import FILE_NAME, Checkpoint, load, save
from cifar_exp.errors import StorageError
from cifar_exp.models import convnet


def trained(seed: int = 0) -> Checkpoint:
    torch.manual_seed(seed)
    model = convnet(num_classes=3, width=4, depth=1)
    model(torch.randn(8, 3, 16, 16))  # moves the batch-norm statistics
    return Checkpoint(
        model=model.state_dict(),
        epoch=7,
        step=1365,
        classes=("ant", "bee", "żaba"),
        shift=(125.3, 122.95, 113.87),
        scale=(1 / 63, 1.0, 0.5),
        image_size=(16, 24),
    )


def assert_same(left: Checkpoint, right: Checkpoint) -> None:
    assert list(left.model) == list(right.model)
    for name, value in left.model.items():
        assert value.dtype == right.model[name].dtype
        assert torch.equal(value, right.model[name])
    assert {**vars(left), "model": None} == {**vars(right), "model": None}


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = trained()
    save(tmp_path, saved)
    loaded = load(tmp_path)
    assert_same(loaded, saved)
    model = convnet(num_classes=3, width=4, depth=1)
    model.load_state_dict(loaded.model)
    assert [path.name for path in (tmp_path / FILE_NAME).parent.iterdir()] == ["last.pt"]


def test_the_last_checkpoint_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, trained(0))
    save(tmp_path, trained(1))
    assert_same(load(tmp_path), trained(1))
    assert [path.name for path in (tmp_path / FILE_NAME).parent.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
def test_a_save_that_fails_half_way_keeps_the_one_before_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save(tmp_path, trained(0))

    def fail(_fields: Any, file: Any) -> None:
        file.write(b"half of it")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", fail)
        with pytest.raises(StorageError, match=r"last\.pt: the network could not be saved"):
            save(tmp_path, trained(1))
    assert_same(load(tmp_path), trained(0))
    assert [path.name for path in (tmp_path / FILE_NAME).parent.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("blocked", ["run", "run/checkpoints"])
def test_a_file_where_a_folder_should_be_is_a_storage_error(tmp_path: Path, blocked: str) -> None:
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("not a folder")
    with pytest.raises(StorageError) as refusal:
        save(tmp_path / "run", trained())
    assert str(tmp_path / "run" / FILE_NAME) in str(refusal.value)
    assert (tmp_path / blocked).read_text() == "not a folder"
    with pytest.raises(StorageError):
        load(tmp_path / "run")


def test_no_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"checkpoints/last\.pt: there is no saved network. Name a run"):
        load(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_a_storage_error(tmp_path: Path, kept: float) -> None:
    save(tmp_path, trained())
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(StorageError) as refusal:
        load(tmp_path)
    assert str(path) in str(refusal.value)


def test_a_file_of_something_else_is_a_storage_error(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.parent.mkdir()
    torch.save({"state_dict": {}}, path)
    with pytest.raises(StorageError, match="cannot be read"):
        load(tmp_path)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Malicious(marker)))
    marker.rmdir()  # it would have worked
    path = tmp_path / FILE_NAME
    path.parent.mkdir()
    content = dict(vars(trained())) | {"classes": Malicious(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(StorageError):
        load(tmp_path)
    assert not marker.exists()
