"""What is saved of a run, and how it comes back bit for bit.

``checkpoints/step-00001365.pt`` holds a checkpoint; the ``.json`` of that name, its manifest, the sha256 that it must
have. The manifest is written last: a checkpoint without one was never finished. Every file is written under another
name, forced to disk and renamed, so that a reader sees the whole of it or nothing, whenever the writer was killed.
"""

import hashlib
import io
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_exp.errors import FREE_SPACE, StorageError
from cifar_exp.system.atomic_files import write_atomically

FOLDER = "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A network in training: what it takes to use it, and to go on as if nothing had happened.

    Attributes:
        model: state dict of the network to use, buffers included: of averaged weights where these are kept.
        trained: state dict of the network to train on; the same where no weights are averaged.
        training: the trainer's state: optimizer, epoch, step, times.
        classes: names of the labels, in order.
        shift: subtracted from each channel, 0..255.
        scale: multiplied to each channel after that.
        image_size: height and width of the training images.
    """

    model: Mapping[str, Tensor]
    trained: Mapping[str, Tensor]
    training: Mapping[str, Any]
    classes: tuple[str, ...]
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    image_size: tuple[int, int]


@dataclass(frozen=True)
class Manifest:
    """What can be known of a checkpoint without reading it.

    Attributes:
        file: its name, in the same folder.
        bytes: its size.
        sha256: of its content, in hex.
        epoch: whole epochs trained.
        step: steps trained.
        global_batch_size: images a step over all ranks.
        world_size: number of ranks.
        data_hash: sha256 of the images, in hex.
        config_hash: sha256 of the settings that bear on the result, in hex.
        seconds: the run had taken, over all its sessions.
        torch: the version that wrote it.
        python: the same.
        cifar_exp: the same.
        run_id: the tracker's; None where none had taken the run yet.
        best_step: steps of the checkpoint of the best epoch so far, which stays whatever newer ones there are; None
            where no images are kept apart to choose it by.
        best_value: what that epoch was measured at: ``early_stopping.metric``.
    """

    file: str
    bytes: int
    sha256: str
    epoch: int
    step: int
    global_batch_size: int
    world_size: int
    data_hash: str
    config_hash: str
    seconds: float
    torch: str
    best_step: int | None = None
    best_value: float | None = None
    python: str = ""
    cifar_exp: str = ""
    run_id: str | None = None


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint stands in its run: the fields of the same names in :class:`Manifest`."""

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


def save(run_dir: Path, checkpoint: Checkpoint, origin: Origin, keep: int) -> None:
    """Write a checkpoint, then delete all but the ``keep`` newest and the best that each of these knows.

    Raises:
        StorageError: where the file system refuses; what was there before stays.
    """
    folder = run_dir / FOLDER
    path = _unnamed(_path(run_dir, origin.step))
    buffer = io.BytesIO()
    torch.save(dict(vars(checkpoint)), buffer)
    content = buffer.getvalue()
    digest = hashlib.sha256(content).hexdigest()
    manifest = Manifest(
        path.name,
        len(content),
        digest,
        **vars(origin),
        torch=torch.__version__,
        python=platform.python_version(),
        cifar_exp=_own_version(),
    )
    manifest_path = _path(run_dir, origin.step).with_suffix(".json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.tmp"):  # of a writer that was killed
            leftover.unlink()
        write_atomically(path, content)
        write_atomically(manifest_path, sealed(asdict(manifest)))
        _delete_networks(manifest_path, but=path)
        manifests = sorted(folder.glob("*.json"))
        # This one is not the newest where a run has gone on from one before a damaged one.
        newest = {*manifests[-keep:], manifest_path}
        for old in set(manifests) - newest - set(map(_best_named_by, newest)):
            old.unlink()  # first: without it the file beside it counts for nothing
            _delete_networks(old)
    except OSError as error:
        raise StorageError(f"{path}: the network could not be saved: {error}. {FREE_SPACE}") from error


def sound(run_dir: Path, warn: Callable[[str], None]) -> Manifest | None:
    """The newest checkpoint whose content has the hash that it was written with; None where none was ever finished.

    Args:
        run_dir: the run's folder.
        warn: called with a line for each damaged one that is passed over.

    Raises:
        StorageError: where there are checkpoints and all are damaged.
    """
    paths = sorted((run_dir / FOLDER).glob("*.json"), reverse=True)
    for path in paths:
        if manifest := _verified(path, warn):
            return manifest
    if paths:
        raise StorageError(
            f"{run_dir / FOLDER}: all {len(paths)} checkpoint(s) are damaged. Restore one from a backup, or type "
            f"resume=never to start again from the beginning"
        )
    return None


def _verified(path: Path, warn: Callable[[str], None]) -> Manifest | None:
    """The manifest at ``path`` where the checkpoint's content is what it says."""
    try:
        manifest = _unsealed(path.read_bytes())
        content = path.with_name(manifest.file).read_bytes()
    except (OSError, ValueError, TypeError) as error:
        warn(f"{path}: the checkpoint cannot be read and is passed over: {error}")
        return None
    if len(content) == manifest.bytes and hashlib.sha256(content).hexdigest() == manifest.sha256:
        return manifest
    warn(f"{path.with_name(manifest.file)}: the checkpoint is damaged and is passed over")
    return None


def sealed(fields: Mapping[str, Any]) -> bytes:
    """The content of a manifest's file, with a hash of its own: a step or a batch size that was altered is noticed."""
    seal = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    return json.dumps({**fields, "seal": seal}, indent=1).encode()


def _unsealed(content: bytes) -> Manifest:
    """The manifest that was written as ``content``.

    Raises:
        ValueError: where it was not written so. TypeError: where it lacks a field that was always there.
    """
    fields = dict(json.loads(content))
    fields.pop("seal", None)
    if sealed(fields) != content:
        raise ValueError("it is not as it was written")
    return Manifest(**fields)


def load(run_dir: Path, manifest: Manifest) -> Checkpoint:
    """A checkpoint that was found :func:`sound`; nothing in it is executed (``weights_only``).

    Raises:
        StorageError: where it cannot be read, or is no checkpoint of this package.
    """
    path = run_dir / FOLDER / manifest.file
    try:
        fields: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return Checkpoint(**fields)
    except Exception as error:  # torch.load has no common class for what a damaged file raises
        raise StorageError(f"{path}: the checkpoint cannot be read: {error}") from error


def newest(run_dir: Path, warn: Callable[[str], None]) -> Checkpoint:
    """The newest sound checkpoint of a run.

    Raises:
        StorageError: where it has none.
    """
    manifest = sound(run_dir, warn)
    if manifest is None:
        raise StorageError(f"{run_dir / FOLDER}: there is no saved network. Name a run that has finished an epoch")
    return load(run_dir, manifest)


def best(run_dir: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint of a run's best epoch, as its newest sound one names it; None where no best one is kept.

    Raises:
        StorageError: where it is damaged or gone.
    """
    manifest = sound(run_dir, warn)
    if manifest is None or manifest.best_step is None:
        return None
    path = _path(run_dir, manifest.best_step)
    if manifest.best_step != manifest.step:
        manifest = _verified(path.with_suffix(".json"), warn)
    if manifest is None:
        raise StorageError(
            f"{path}: the checkpoint of the best epoch is damaged or gone. Restore it from a backup; the newest one is "
            f"what cifar-exp-predict checkpoint=last takes"
        )
    return load(run_dir, manifest)


def _path(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:08}.pt"


def _own_version() -> str:
    try:
        return version("cifar-exp")
    except PackageNotFoundError:  # a copy of the source that was never installed
        return ""


def _unnamed(path: Path) -> Path:
    """Where a step's network can be written while the one that its manifest names, if there is one, stays whole."""
    try:
        named = json.loads(path.with_suffix(".json").read_text())["file"]
    except (OSError, ValueError, TypeError, KeyError):  # there is none, or it is damaged
        return path
    return path.with_stem(f"{path.stem}-again") if named == path.name else path


def _delete_networks(manifest: Path, but: Path | None = None) -> None:
    """Delete the files of a step's networks, all or all but one."""
    for path in {manifest.with_suffix(".pt"), manifest.with_name(f"{manifest.stem}-again.pt")} - {but}:
        path.unlink(missing_ok=True)


def _best_named_by(manifest: Path) -> Path:
    """The manifest of the best checkpoint that the one at ``manifest`` names; itself where it names none."""
    try:
        step = json.loads(manifest.read_text())["best_step"]
    except (OSError, ValueError, TypeError, KeyError):  # damaged, or written before there was such a field
        return manifest
    return manifest if step is None else _path(manifest.parents[1], step).with_suffix(".json")
