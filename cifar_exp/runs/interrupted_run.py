"""Find the run that ``resume=auto`` continues if the new run's folder has none."""

import os
from collections.abc import Callable
from pathlib import Path

from cifar_exp.config.arguments import argument
from cifar_exp.config.messages import shown
from cifar_exp.config.schema import Config
from cifar_exp.errors import ConfigError, StorageError
from cifar_exp.records.run_folder import OUTPUTS, RUN_FILE, Outcome, is_finished, is_locked, lock_run_folder
from cifar_exp.records.run_identity import original_of
from cifar_exp.runs.config_changes import UNREADABLE, changed_settings, has_same_settings
from cifar_exp.system import foreign_files
from cifar_exp.system.locks import Held


def lock_interrupted_run(config: Config, warn: Callable[[str], None]) -> tuple[Path, Held] | None:
    """The newest interrupted run under ``outputs/`` with these settings, and its lock; None if there is none.

    If all interrupted runs have other settings, ``warn`` gets the settings in which the newest one differs.
    """
    found = sorted(OUTPUTS.rglob(RUN_FILE), key=lambda path: path.stat().st_mtime, reverse=True)
    other: str | None = None
    for path in found:
        folder = path.parent
        try:
            content = foreign_files.read_json(path)
            if original_of(folder, content):
                continue  # a backup of the interrupted run
            if has_same_settings(content, config):
                if not is_finished(folder) and (lock := _lock(folder)):
                    return folder, lock
            elif other is None and not _has_finished(folder) and not is_locked(folder):
                other = _other_settings(folder, config)
        except (*UNREADABLE, StorageError) as error:
            warn(f"{folder}: the run cannot be read and is skipped: {error}")
    if other:
        warn(other)
    return None


def _lock(folder: Path) -> Held | None:
    """The lock of a run's folder; None if another process trains in it."""
    try:
        return lock_run_folder(folder)
    except ConfigError:
        return None


def _has_finished(folder: Path) -> bool:
    return (outcome := Outcome.of(folder)) is not None and outcome.status == "FINISHED"


def _other_settings(folder: Path, config: Config) -> str:
    """The message about an interrupted run that ``resume=auto`` does not continue."""
    changes = changed_settings(folder, config)
    shown_changes = [f"{name}: {shown(then)} then, {shown(now)} now" for name, (then, now) in changes.items()]
    more = f"; {len(changes) - 5} more" if len(changes) > 5 else ""
    return (
        f"resume=auto: a new run starts. {os.path.relpath(folder)} was interrupted and had other settings "
        f"({'; '.join(shown_changes[:5])}{more}). Set them as they were to continue it, or "
        f"{argument('resume', os.path.relpath(folder))} for a new run from its checkpoint"
    )
