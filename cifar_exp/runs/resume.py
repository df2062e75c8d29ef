"""Find the run to resume, or the checkpoint of another run to start from."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cifar_exp.config.arguments import argument
from cifar_exp.config.messages import shown
from cifar_exp.config.schema import Config
from cifar_exp.errors import ConfigError, DataError, StorageError
from cifar_exp.records import checkpoint, journal
from cifar_exp.records.checkpoint import Manifest
from cifar_exp.records.find_run import checked, find_run
from cifar_exp.records.run_folder import CHECKPOINTS, CONFIG_FILE, OUTPUTS, RUN_FILE, RunInfo, is_finished
from cifar_exp.records.run_identity import known_hashes
from cifar_exp.runs.config_changes import UNREADABLE, changed_settings, config_hash, config_of
from cifar_exp.runs.interrupted_run import lock_interrupted_run
from cifar_exp.system.bugs import is_bug, keep_traceback
from cifar_exp.system.locks import Held
from cifar_exp.system.own_version import own_version


@dataclass(frozen=True)
class Resumption:
    """The run to continue and the checkpoint to continue from.

    Attributes:
        run_dir: the folder of the run to continue.
        manifest: the checkpoint to load; None if the run was stopped before its first checkpoint.
        elapsed: seconds that the run took in its earlier sessions; 0 if a new run starts from the checkpoint.
        finished: whether the run is already finished.
        changes: settings that differ from the run to continue: name -> (old, new).
        in_place: whether the run continues in its own folder. If not, a new run starts from its checkpoint.
        source: the folder of the run that has the checkpoint: ``run_dir``, or the run that ``run_dir`` started from.
        lock: the lock of ``run_dir`` if ``auto`` has chosen the run, so that no other start chooses it.
    """

    run_dir: Path
    manifest: Manifest | None
    elapsed: float
    finished: bool
    changes: Mapping[str, tuple[Any, Any]]
    in_place: bool
    source: Path
    lock: Held | None = None

    @property
    def kept_batch(self) -> int | None:
        """The checkpoint's global batch size in images. It is kept on any number of devices.

        None if the settings ask for another batch size or scaling.
        """
        if self.manifest is None or {"train.batch_size", "train.scaling"} & self.changes.keys():
            return None
        return self.manifest.global_batch_size

    def check_images(self, data_hash: str) -> None:
        """Check that a resumed run continues with the same images.

        Args:
            data_hash: the content hash of the images.

        Raises:
            DataError: the images have changed.
        """
        own = self.in_place and self.source == self.run_dir
        if own and self.manifest and self.manifest.data_hash != data_hash:
            raise DataError(
                f"data: the images are not those that {self.run_dir} was trained on. Restore them, or set resume=never"
            )

    def description(self, world_size: int) -> list[str]:
        """Lines for the user: which run continues, from which step, and what has changed.

        Args:
            world_size: the number of ranks now.
        """
        folder = os.path.relpath(self.run_dir)
        if self.manifest is None:
            return [f"{folder} was stopped before its first checkpoint: it starts again"]
        how = f"{folder} continues" if self.in_place else f"this new run starts from the checkpoint of {folder}"
        if self.source != self.run_dir:
            how = f"{folder} starts again from the checkpoint of {os.path.relpath(self.source)}"
        lines = [f"{how} after epoch {self.manifest.epoch} (step {self.manifest.step})"]
        lines += [f"  {name}: {shown(then)} then, {shown(now)} now" for name, (then, now) in self.changes.items()]
        if self.manifest.world_size != world_size:
            batch = self.kept_batch
            same = f": {batch} images per step in the same order, {batch // world_size} per device" if batch else ""
            lines.append(f"  {self.manifest.world_size} device(s) then, {world_size} now{same}")
        return lines


def find(config: Config, run_dir: Path, anywhere: bool, warn: Callable[[str], None]) -> Resumption | None:
    """Find the run that ``config.resume`` asks for.

    Args:
        config: the configuration of the run to start.
        run_dir: the folder of the run to start.
        anywhere: whether ``auto`` may continue an interrupted run in another folder under ``outputs/`` if ``run_dir``
            has none. A job of a sweep may not.
        warn: called with a line for each damaged checkpoint.

    Returns:
        The run to continue; None to start a new run.

    Raises:
        ConfigError: there is no such run, or it cannot continue with these settings.
        StorageError: the run cannot be read, or all its checkpoints are damaged.
    """
    if config.resume == "never":
        return None
    lock: Held | None = None
    if config.resume != "auto":
        folder = find_run(config.resume, "resume")
    elif (run_dir / RUN_FILE).exists():
        folder = checked(run_dir)
    elif anywhere and (interrupted := lock_interrupted_run(config, warn)):
        folder, lock = interrupted
    else:
        return None
    try:
        changes = changed_settings(folder, config)
        if changes and config.resume == "auto":
            raise ConfigError(_changed_in_its_folder(run_dir, changes))
        in_place = not changes and (anywhere or folder.resolve() == run_dir.resolve())
        return replace(_resumption(folder, config, changes, in_place, warn), lock=lock)
    except UNREADABLE as error:
        # The cause is most likely a damaged file, but it could be a bug.
        kept = f" (its traceback is in {keep_traceback(error)})" if is_bug(error) else ""
        raise StorageError(
            f"{folder}: the run cannot be read: {error}{kept}. Restore its {RUN_FILE}, {CONFIG_FILE} and "
            f"{journal.JOURNAL_FILE}, or set resume=never"
        ) from error


def _changed_in_its_folder(run_dir: Path, changes: Mapping[str, tuple[Any, Any]]) -> str:
    """The message about a run folder whose run had other settings."""
    old_settings = ", ".join(
        argument(name, then) if isinstance(then, str) else f"{name}={shown(then)}"
        for name, (then, _) in changes.items()
    )
    other = f"{argument('resume', str(run_dir))} and another folder"
    return (
        f"hydra.run.dir={run_dir}: the run in that folder had other settings. Set {old_settings}, another folder, or "
        f"{other} for a new run that starts from its checkpoint"
    )


def _resumption(
    folder: Path, config: Config, changes: Mapping[str, tuple[Any, Any]], in_place: bool, warn: Callable[[str], None]
) -> Resumption:
    finished = in_place and is_finished(folder)
    manifest = None if finished else checkpoint.newest_intact_manifest(folder, warn)
    entries = journal.read(folder)
    begun = None
    if manifest is None and not finished:
        if not in_place:
            raise ConfigError(f"resume={config.resume}: {folder} has no checkpoint to start from. Set resume=never")
        begun = _beginning(folder, config, warn)
        # A checkpoint is on disk before the next epoch ends, so later journal entries prove that there was one.
        every = int(config_of(folder)["checkpoint"]["every"])
        first = begun.manifest.epoch if begun and begun.manifest else 0
        if any(entry.epoch > first + every + 1 for entry in entries):
            raise StorageError(
                f"{folder / CHECKPOINTS}: the run has trained whole epochs and its checkpoints are gone. Restore "
                f"them, or set resume=never to start again from the beginning"
            )
    if manifest is not None:
        _check_belongs_to_run(folder, manifest, None if changes else config_hash(config))
    if manifest is not None and not in_place:
        _check_changes(config, manifest, changes)
    times = [entry.time for entry in entries[-1:]] + ([manifest.seconds] if manifest else [])
    elapsed = max(times, default=0.0) if in_place else 0.0
    if begun:
        return replace(begun, run_dir=folder, elapsed=elapsed, in_place=True)
    return Resumption(folder, manifest, elapsed, finished, changes, in_place, source=folder)


def _check_belongs_to_run(folder: Path, manifest: Manifest, now: str | None) -> None:
    """Check that a checkpoint was trained with the settings of the run that its folder belongs to.

    Args:
        folder: the run folder.
        manifest: the manifest of the checkpoint.
        now: the current config hash if the settings equal the run's.

    Raises:
        ConfigError: the checkpoint belongs to another run.
    """
    known = known_hashes(folder, same_version=manifest.cifar_exp == own_version())
    if known and manifest.config_hash not in {*known, now}:
        path = folder / CHECKPOINTS / manifest.file
        raise ConfigError(
            f"{path}: it is the checkpoint of a run with other settings (their hash is {manifest.config_hash[:8]}, "
            f"that of this run {min(known)[:8]}). Move {path.name} and {path.stem.removesuffix('-again')}.json back to "
            f"their run's folder, or remove them to continue with this run's own"
        )


def _beginning(folder: Path, config: Config, warn: Callable[[str], None]) -> Resumption | None:
    """The checkpoint of another run that the run in ``folder`` started from; None if it did not start from one.

    Raises:
        StorageError: that checkpoint no longer exists, or is neither under ``outputs/`` nor beside ``folder``.
    """
    started_from = RunInfo.load(folder).started_from
    if started_from is None:
        return None
    source, step = started_from
    places = (OUTPUTS.resolve(), folder.resolve().parent)
    if not any(source.resolve().is_relative_to(place) for place in places):  # the folder may come from another user
        raise StorageError(
            f"{folder}: the run had no checkpoint yet and names {source}, which is not under {OUTPUTS}/, as the run "
            f"that it started from. Set {argument('resume', str(source))} for a new run from there, or resume=never"
        )
    checked(source)
    manifest = checkpoint.newest_intact_manifest(source, warn)
    if manifest is None or manifest.step != step:
        found = f"the newest one there has step {manifest.step}" if manifest else "there is none now"
        raise StorageError(
            f"{folder}: the run had no checkpoint yet. It started from the checkpoint of {source} at step {step}; "
            f"{found}. Restore it, or set resume=never"
        )
    return _resumption(source, config, changed_settings(source, config), in_place=False, warn=warn)


def _check_changes(config: Config, manifest: Manifest, changes: Mapping[str, tuple[Any, Any]]) -> None:
    for name, (then, _) in changes.items():
        if name.startswith("model.") or name == "optimizer._target_":
            raise ConfigError(
                f"{name}: the checkpoint was trained with {shown(then)}, and its state requires that. Set "
                f"{name}={shown(then)}, or resume=never"
            )
    if config.validation and "data.validation" in changes:
        then = changes["data.validation"][0] or 0
        raise ConfigError(
            f"data.validation={config.validation}: the checkpoint was trained with {then}, so it was trained on "
            f"images of the new validation split. Set data.validation={then}, or resume=never"
        )
    if manifest.epoch >= config.train.epochs:
        raise ConfigError(
            f"train.epochs={config.train.epochs}: the checkpoint has {manifest.epoch} epochs already. Set "
            f"train.epochs={manifest.epoch + 1} or more"
        )
