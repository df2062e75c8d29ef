"""Checkpoints: saved atomically, verified by sha256 before loading, restored bit for bit.

``checkpoints/step-00001365.pt`` is a checkpoint; the ``.json`` file of the same name is its manifest with the sha256.
The manifest is written last: a checkpoint without a manifest is incomplete.
"""

import dataclasses
import hashlib
import io
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from cifar_exp.errors import FREE_SPACE, StorageError
from cifar_exp.records import checkpoint_content
from cifar_exp.records.checkpoint_files import (
    best_named_by,
    checkpoint_path,
    delete_checkpoint,
    free_path,
    is_named_by,
    manifests,
    remove_leftovers,
)
from cifar_exp.records.run_folder import CHECKPOINTS
from cifar_exp.records.stored_facts import reason
from cifar_exp.system import foreign_files
from cifar_exp.system.atomic_files import write_atomically
from cifar_exp.system.own_version import own_version
from cifar_exp.system.printable import printable


@dataclass(frozen=True)
class Checkpoint:
    """A network in training: enough to predict with it and to resume its training bit for bit.

    Attributes:
        model: state dict of the network to predict with, buffers included: the EMA of the weights if there is one.
        trained: state dict of the network in training; equal to ``model`` without an EMA.
        training: the trainer's state: optimizer, epoch, step, times.
        classes: class names in the order of their labels.
        shift: subtracted from each channel, 0..255.
        scale: each channel is then multiplied by it.
        image_size: height and width of the images that the network was evaluated on.
        preprocessing: how image files are read, as stored by ``Preprocessing``; None before version 0.2.
    """

    model: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]
    training: Mapping[str, Any]
    classes: tuple[str, ...]
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    image_size: tuple[int, int]
    preprocessing: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class CheckpointPosition:
    """The position of a checkpoint in its run.

    Attributes:
        epoch: completed epochs.
        step: completed steps.
        global_batch_size: images per step over all ranks.
        world_size: number of ranks.
        data_hash: sha256 of the images, in hex.
        config_hash: sha256 of the settings that affect the result, in hex.
        seconds: time of the run so far, over all its sessions.
        best_step: step of the best checkpoint so far, which is kept until a better one is saved; None without a
            validation split.
        best_value: ``early_stopping.metric`` of that epoch.
        run_id: the tracker's id of the run; None if no tracker had opened it yet.
    """

    epoch: int
    step: int
    global_batch_size: int
    world_size: int
    data_hash: str
    config_hash: str
    seconds: float
    best_step: int | None = None
    best_value: float | None = None
    run_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest(CheckpointPosition):
    """The description of a checkpoint, stored in its own file.

    Attributes:
        file: name of the checkpoint, in the same folder.
        bytes: size of the checkpoint.
        sha256: of its content, in hex.
        torch: version that wrote it.
        python: version that wrote it.
        cifar_exp: version that wrote it.
    """

    file: str
    bytes: int
    sha256: str
    torch: str
    python: str = ""
    cifar_exp: str = ""


_MANIFEST = TypeAdapter(Manifest)


def save(run_dir: Path, checkpoint: Checkpoint, position: CheckpointPosition, keep: int) -> None:
    """Write a checkpoint, then delete all but the ``keep`` newest ones and the best ones that their manifests name.

    Raises:
        StorageError: the checkpoint cannot be written; earlier ones are kept.
    """
    folder = run_dir / CHECKPOINTS
    path = free_path(checkpoint_path(run_dir, position.step))
    buffer = io.BytesIO()
    torch.save(dict(vars(checkpoint)), buffer)
    content = buffer.getvalue()
    manifest = Manifest(
        **vars(position),
        file=path.name,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        torch=torch.__version__,
        python=platform.python_version(),
        cifar_exp=own_version(),
    )
    manifest_path = checkpoint_path(run_dir, position.step).with_suffix(".json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(run_dir)
        write_atomically(path, content)
        write_atomically(manifest_path, sealed(asdict(manifest)))
        delete_checkpoint(manifest_path, but=path)
        saved = manifests(run_dir)
        # This one is not the newest if the run resumed from before a damaged checkpoint.
        newest = {*saved[-keep:], manifest_path}
        for old in set(saved) - newest - set(map(best_named_by, newest)):
            old.unlink()  # first: a checkpoint without a manifest is ignored
            delete_checkpoint(old)
    except OSError as error:
        raise StorageError(f"{path}: the checkpoint could not be saved: {error}. {FREE_SPACE}") from error


def newest_intact_manifest(run_dir: Path, warn: Callable[[str], None]) -> Manifest | None:
    """The manifest of the newest checkpoint whose size and sha256 match it. None if no checkpoint was completed.

    Args:
        run_dir: the run's folder.
        warn: called with a message for each damaged checkpoint that is skipped.

    Raises:
        StorageError: all checkpoints are damaged.
    """
    paths = manifests(run_dir)[::-1]
    for path in paths:
        if manifest := _verified(path, warn):
            return manifest
    if paths:
        raise StorageError(
            f"{run_dir / CHECKPOINTS}: all {len(paths)} checkpoint(s) are damaged. Restore one from a backup, or set "
            f"resume=never to start again from the beginning"
        )
    return None


def _verified(path: Path, warn: Callable[[str], None]) -> Manifest | None:
    """The manifest at ``path`` if the checkpoint has its size and sha256, else None after a warning.

    Raises:
        StorageError: a later version wrote it.
    """
    try:
        manifest = _unsealed(path)
        if not is_named_by(path, manifest.file) or checkpoint_path(path.parents[1], manifest.step).stem != path.stem:
            raise ValueError(f"it is the manifest of step {manifest.step}, renamed")
        digest = checkpoint_content.sha256(path.with_name(manifest.file), manifest.bytes)
    except (OSError, ValueError) as error:
        warn(f"{path}: the checkpoint cannot be read and is skipped: {error}")
        return None
    if digest == manifest.sha256:
        return manifest
    warn(f"{path.with_name(manifest.file)}: the checkpoint is damaged and is skipped")
    return None


def sealed(fields: Mapping[str, Any]) -> bytes:
    """The content of a manifest file. `seal` is the sha256 of the fields, so that an altered field is detected."""
    seal = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    return json.dumps({**fields, "seal": seal}, indent=1).encode()


def _unsealed(path: Path) -> Manifest:
    """The manifest at ``path``.

    Raises:
        ValueError: the seal is wrong, or a field is missing or has the wrong type.
        StorageError: it has fields that this version does not know.
    """
    content = foreign_files.read_text(path)
    fields = foreign_files.fields_from_json(content)
    fields.pop("seal", None)
    if sealed(fields) != content.encode():
        raise ValueError("it was changed after it was written")
    _check_known(path, fields, Manifest, fields.get("cifar_exp"))
    try:
        return _MANIFEST.validate_python(fields)
    except ValidationError as error:
        raise ValueError(reason(error)) from error


def _check_known(path: Path, fields: Mapping[str, Any], kind: type, version: object) -> None:
    """Refuse fields that this version does not know: a later version wrote the checkpoint and may need them.

    Raises:
        StorageError: there is such a field.
    """
    if unknown := sorted(fields.keys() - {field.name for field in dataclasses.fields(kind)}):
        versions = f"{printable(version or 'unknown')}, and this is {own_version() or 'unknown'}"
        raise StorageError(
            f"{path}: a newer version of cifar-exp wrote the checkpoint ({versions}): it has "
            f"{printable(', '.join(unknown[:5]))}. Install that version, choose another run, or set resume=never to "
            f"start again from the beginning"
        )


def load(run_dir: Path, manifest: Manifest) -> Checkpoint:
    """A checkpoint that :func:`newest_intact_manifest` has verified; no code in it is executed (``weights_only``).

    Raises:
        StorageError: the file cannot be read, or is not a checkpoint of this package.
    """
    path = run_dir / CHECKPOINTS / manifest.file
    try:
        fields = checkpoint_content.load(path)
        _check_known(path, fields, Checkpoint, manifest.cifar_exp)
        return Checkpoint(**fields)
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: the checkpoint cannot be read: {error}") from error


def newest(run_dir: Path, warn: Callable[[str], None]) -> Checkpoint:
    """The newest intact checkpoint of a run.

    Raises:
        StorageError: it has none.
    """
    manifest = newest_intact_manifest(run_dir, warn)
    if manifest is None:
        raise StorageError(f"{run_dir / CHECKPOINTS}: there is no checkpoint. Choose a run that has finished an epoch")
    return load(run_dir, manifest)


def best(run_dir: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint of a run's best epoch, which the newest intact manifest names; None without a best epoch.

    Raises:
        StorageError: it is damaged or missing.
    """
    manifest = newest_intact_manifest(run_dir, warn)
    if manifest is None or manifest.best_step is None:
        return None
    path = checkpoint_path(run_dir, manifest.best_step)
    if manifest.best_step != manifest.step:
        manifest = _verified(path.with_suffix(".json"), warn)
    if manifest is None:
        raise StorageError(
            f"{path}: the checkpoint of the best epoch is damaged or missing. Restore it from a backup, or predict "
            f"with the newest one: cifar-exp predict RUN checkpoint=last"
        )
    return load(run_dir, manifest)
