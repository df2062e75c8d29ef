"""A checkpoint is restored bit for bit, or one message names the damaged file; nothing in a file is executed."""

import hashlib
import json
import pickle
import platform
import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_exp.errors import StorageError
from cifar_exp.records import checkpoint
from cifar_exp.records.checkpoint import (
    Checkpoint,
    CheckpointPosition,
    load,
    newest,
    newest_intact_manifest,
    save,
    sealed,
)
from cifar_exp.records.checkpoint_saver import CheckpointSaver
from cifar_exp.records.run_folder import CHECKPOINTS
from tests.helpers.checkpoints import Malicious, position, reseal, silent, trained


def assert_same(left: Any, right: Any) -> None:
    """Equal, however deep, tensors bit for bit."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def assert_equal(left: Checkpoint, right: Checkpoint) -> None:
    for name in vars(left):
        one, other = vars(left)[name], vars(right)[name]
        mapped = isinstance(one, Mapping)  # a state dict is an OrderedDict until it has been saved
        assert_same(dict(one) if mapped else one, dict(other) if mapped else other)


def files(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / CHECKPOINTS).iterdir())


def test_checkpoint_round_trip_is_bit_for_bit(tmp_path: Path) -> None:
    saved = trained()
    save(tmp_path, saved, position(70), keep=2)
    manifest = newest_intact_manifest(tmp_path, silent)
    assert manifest is not None
    assert (manifest.epoch, manifest.step, manifest.global_batch_size, manifest.world_size) == (7, 70, 64, 2)
    assert manifest.data_hash == "ab" * 32
    assert_equal(load(tmp_path, manifest), saved)
    assert files(tmp_path) == ["step-00000070.json", "step-00000070.pt"]


def test_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 100):
        save(tmp_path, trained(step), position(step), keep=2)
    assert files(tmp_path) == [f"step-{step:08}.{kind}" for step in (20, 100) for kind in ("json", "pt")]
    assert_equal(newest(tmp_path, silent), trained(100))


def best_at(step: int, best_step: int) -> CheckpointPosition:
    return replace(position(step), best_step=best_step, best_value=best_step / 1000)


def test_best_checkpoint_is_kept_beside_newer_ones(tmp_path: Path) -> None:
    for step, best_step in ((10, 10), (20, 20), (30, 20), (40, 20)):
        save(tmp_path, trained(step), best_at(step, best_step), keep=1)
    assert files(tmp_path) == [f"step-{step:08}.{kind}" for step in (20, 40) for kind in ("json", "pt")]
    found = checkpoint.best(tmp_path, silent)
    assert found is not None
    assert_equal(found, trained(20))
    assert_equal(newest(tmp_path, silent), trained(40))
    save(tmp_path, trained(50), best_at(50, 50), keep=1)
    assert files(tmp_path) == ["step-00000050.json", "step-00000050.pt"]
    found = checkpoint.best(tmp_path, silent)
    assert found is not None
    assert_equal(found, trained(50))


def test_older_checkpoint_still_has_its_best_one(tmp_path: Path) -> None:
    for step, best_step in ((10, 10), (20, 10), (30, 30)):
        save(tmp_path, trained(step), best_at(step, best_step), keep=2)
    (tmp_path / CHECKPOINTS / "step-00000030.pt").write_bytes(b"")
    messages: list[str] = []
    found = checkpoint.best(tmp_path, messages.append)
    assert found is not None
    assert_equal(found, trained(10))
    assert messages == [f"{tmp_path / CHECKPOINTS / 'step-00000030.pt'}: the checkpoint is damaged and is skipped"]
    save(tmp_path, trained(25), best_at(25, 25), keep=1)  # it goes on from there
    found = checkpoint.best(tmp_path, messages.append)
    assert found is not None
    assert_equal(found, trained(25))


def test_damaged_or_missing_best_checkpoint_is_an_error(tmp_path: Path) -> None:
    assert checkpoint.best(tmp_path, silent) is None
    save(tmp_path, trained(10), position(10), keep=1)
    assert checkpoint.best(tmp_path, silent) is None
    for step, best_step in ((20, 20), (30, 20)):
        save(tmp_path, trained(step), best_at(step, best_step), keep=1)
    path = tmp_path / CHECKPOINTS / "step-00000020.pt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        StorageError, match=r"step-00000020\.pt: the checkpoint of the best epoch is damaged or missing"
    ):
        checkpoint.best(tmp_path, lambda _: None)
    path.with_suffix(".json").unlink()
    with pytest.raises(
        StorageError, match=r"step-00000020\.pt: the checkpoint of the best epoch is damaged or missing"
    ):
        checkpoint.best(tmp_path, lambda _: None)


def test_save_copies_tensors_so_that_training_continues(tmp_path: Path) -> None:
    saved, expected = trained(), trained()
    with CheckpointSaver(tmp_path, keep=2) as saver:
        saver.save(saved, position(10))
        for value in saved.model.values():
            value.fill_(0)
        saved.training["rates"].append(99.0)
    assert_equal(newest(tmp_path, silent), expected)


def test_failed_save_is_reported_and_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, trained(0), position(10), keep=2)

    def refuse(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", refuse)
        refusal = pytest.raises(
            StorageError, match=r"step-00000020\.pt: the checkpoint could not be saved: .*No space left"
        )
        with refusal, CheckpointSaver(tmp_path, keep=1) as saver:
            saver.save(trained(1), position(20))
    assert files(tmp_path) == ["step-00000010.json", "step-00000010.pt"]
    assert_equal(newest(tmp_path, silent), trained(0))


@pytest.mark.parametrize("file", ["step-00000010-again.pt", "step-00000010.json"])
def test_saving_a_step_again_keeps_the_old_checkpoint_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """A run that is stopped in an evaluation saves there; the resumed run saves the same step again after it."""
    save(tmp_path, trained(0), position(10), keep=1)
    replace_file = Path.replace

    def refuse(path: Path, target: Path) -> Path:
        if target.name == file:
            raise OSError(28, "No space left on device")
        return replace_file(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(StorageError, match="No space left"):
            save(tmp_path, trained(1), position(10), keep=1)
    assert_equal(newest(tmp_path, silent), trained(0))
    for seed in (2, 3):
        save(tmp_path, trained(seed), position(10), keep=1)
        assert_equal(newest(tmp_path, silent), trained(seed))
        assert len(files(tmp_path)) == 2
    save(tmp_path, trained(4), position(20), keep=1)
    assert files(tmp_path) == ["step-00000020.json", "step-00000020.pt"]


def test_manifest_of_an_earlier_version_is_valid(tmp_path: Path) -> None:
    save(tmp_path, trained(0), replace(position(10), run_id="ab12"), keep=1)
    manifest = newest_intact_manifest(tmp_path, silent)
    assert manifest is not None
    assert (manifest.run_id, manifest.python, manifest.cifar_exp) == ("ab12", platform.python_version(), "0.1.0")
    path = tmp_path / CHECKPOINTS / "step-00000010.json"
    fields = json.loads(path.read_text())
    path.write_bytes(sealed({name: fields[name] for name in fields if name not in ("run_id", "python", "seal")}))
    manifest = newest_intact_manifest(tmp_path, silent)
    assert manifest is not None
    assert (manifest.run_id, manifest.python, manifest.cifar_exp) == (None, "", "0.1.0")


def test_files_of_a_killed_writer_are_ignored_and_removed(tmp_path: Path) -> None:
    save(tmp_path, trained(0), position(10), keep=2)
    (tmp_path / CHECKPOINTS / "step-00000020.pt").write_bytes(b"whole or not: it has no manifest")
    (tmp_path / CHECKPOINTS / "step-00000020.json.tmp").write_text("{")  # of version 0.1
    (tmp_path / CHECKPOINTS / ".step-00000020.json.cifar-exp-tmp").write_text("{")
    assert_equal(newest(tmp_path, silent), trained(0))
    save(tmp_path, trained(2), position(20), keep=2)
    assert files(tmp_path) == [f"step-{step:08}.{kind}" for step in (10, 20) for kind in ("json", "pt")]


def test_files_with_other_names_beside_the_checkpoints_are_kept(tmp_path: Path) -> None:
    """They are not removed, do not use up a ``keep``, and are no checkpoints."""
    save(tmp_path, trained(0), position(10), keep=2)
    folder = tmp_path / CHECKPOINTS
    notes = ["notes.json", "my-best.pt", "step-best.json", "step-00000010 (1).json", "zz.json", "mine.tmp", "a.pt.tmp"]
    for name in notes:
        (folder / name).write_text("{}")
    (folder / "step-00000099.json").mkdir()  # a folder is no manifest
    for step in (20, 30):
        save(tmp_path, trained(step), position(step), keep=2)
    kept = [f"step-{step:08}.{kind}" for step in (20, 30) for kind in ("json", "pt")]
    assert files(tmp_path) == sorted([*notes, *kept, "step-00000099.json"])
    assert all((folder / name).read_text() == "{}" for name in notes)
    assert_equal(newest(tmp_path, silent), trained(30))
    for name in kept:
        (folder / name).unlink()
    assert newest_intact_manifest(tmp_path, silent) is None


def test_a_checkpoint_that_was_renamed_to_another_step_is_skipped(tmp_path: Path) -> None:
    save(tmp_path, trained(0), position(10), keep=1)
    folder, warnings = tmp_path / CHECKPOINTS, list[str]()
    for kind in ("json", "pt"):
        shutil.copy(folder / f"step-00000010.{kind}", folder / f"step-00000020.{kind}")
    manifest = newest_intact_manifest(tmp_path, warnings.append)
    assert manifest is not None
    assert manifest.step == 10
    assert "it is the manifest of step 10, renamed" in warnings[0]


@pytest.mark.parametrize("blocked", ["run", "run/checkpoints"])
def test_a_file_where_a_folder_should_be_is_a_storage_error(tmp_path: Path, blocked: str) -> None:
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("not a folder")
    with pytest.raises(StorageError) as refusal:
        save(tmp_path / "run", trained(), position(10), keep=2)
    assert str(tmp_path / "run" / CHECKPOINTS) in str(refusal.value)
    assert (tmp_path / blocked).read_text() == "not a folder"


def test_missing_checkpoint_message_has_a_remedy(tmp_path: Path) -> None:
    assert newest_intact_manifest(tmp_path, silent) is None
    with pytest.raises(StorageError, match=r"checkpoints: there is no checkpoint. Choose a run"):
        newest(tmp_path, silent)


def test_damaged_checkpoint_is_named_and_the_previous_one_is_used(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, trained(step), position(step), keep=2)
    path = tmp_path / CHECKPOINTS / "step-00000020.pt"
    whole = path.read_bytes()
    draw = random.Random(0)
    # Cut at every 4 KiB, and any single bit flipped.
    damaged = [whole[:size] for size in range(0, len(whole), 4096)]
    for _ in range(200):
        place = draw.randrange(len(whole))
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        messages: list[str] = []
        manifest = newest_intact_manifest(tmp_path, messages.append)
        assert manifest is not None
        assert manifest.step == 10
        assert messages == [f"{path}: the checkpoint is damaged and is skipped"]
    assert_equal(newest(tmp_path, lambda _: None), trained(10))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"file": "step-00000010.pt"}'])
def test_no_intact_checkpoint_is_an_error(tmp_path: Path, content: str) -> None:
    save(tmp_path, trained(), position(10), keep=2)
    (tmp_path / CHECKPOINTS / "step-00000010.json").write_text(content)
    messages: list[str] = []
    with pytest.raises(StorageError, match=r"all 1 checkpoint\(s\) are damaged") as refusal:
        newest_intact_manifest(tmp_path, messages.append)
    assert "step-00000010.json" in messages[0]
    assert refusal.value.exit_code == 8


def test_altered_manifest_is_skipped(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, trained(step), position(step), keep=2)
    path = tmp_path / CHECKPOINTS / "step-00000020.json"
    path.write_text(path.read_text().replace('"global_batch_size": 64', '"global_batch_size": 65'))
    messages: list[str] = []
    manifest = newest_intact_manifest(tmp_path, messages.append)
    assert manifest is not None
    assert manifest.step == 10
    assert messages == [f"{path}: the checkpoint cannot be read and is skipped: it was changed after it was written"]


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_executed_even_if_its_hash_matches(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Malicious(marker)))
    marker.rmdir()  # it would have worked
    save(tmp_path, trained(), position(10), keep=2)
    path = tmp_path / CHECKPOINTS / "step-00000010.pt"
    content = dict(vars(trained())) | {"classes": Malicious(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    reseal(path.with_suffix(".json"), bytes=path.stat().st_size, sha256=digest)
    with pytest.raises(StorageError, match=r"step-00000010\.pt: the checkpoint cannot be read"):
        newest(tmp_path, silent)
    assert not marker.exists()
