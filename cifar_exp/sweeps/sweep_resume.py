"""Find the sweep to resume, and lock its folder."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cifar_exp.config.arguments import argument
from cifar_exp.config.result_settings import SETTINGS_OUTSIDE_A_SWEEP
from cifar_exp.errors import ConfigError, StorageError
from cifar_exp.records.find_run import find_folder
from cifar_exp.records.folder_check import check_job_folders
from cifar_exp.records.run_folder import OUTPUTS, is_locked, lock_run_folder, make_folder
from cifar_exp.runs.announce import warn
from cifar_exp.runs.config_changes import UNREADABLE
from cifar_exp.system import foreign_files
from cifar_exp.system.atomic_files import write_json
from cifar_exp.system.redaction import masked
from cifar_exp.system.scheduler import requeued

SWEEP_FILE = "sweep.json"


@contextmanager
def claimed_sweep(sweep_dir: Path, wanted: str, arguments: Sequence[str]) -> Iterator[Path]:
    """Lock the folder of the sweep to resume, or ``sweep_dir`` for a new sweep, while the context is open.

    Args:
        sweep_dir: the folder of a new sweep.
        wanted: the setting ``resume``: never, auto, or the folder or MLflow run id of a sweep or a run.
        arguments: the sweep's overrides.

    Yields:
        The locked folder.

    Raises:
        ConfigError: the folder has a sweep with other overrides, or another process uses it.
    """
    if wanted == "never" and "resume=never" not in arguments and requeued() and (sweep_dir / SWEEP_FILE).exists():
        wanted = str(sweep_dir)  # the same command in the same folder
    arguments = masked(
        [argument for argument in arguments if argument.partition("=")[0] not in SETTINGS_OUTSIDE_A_SWEEP]
    )
    other: str | None = None
    for path in _sweeps(wanted):
        content = _sweep_content(path)
        if content is None or (wanted == "auto" and (content["finished"] or not _is_free(path.parent))):
            continue
        if content["arguments"] == arguments:
            with lock_run_folder(path.parent):
                check_job_folders(path.parent)
                yield path.parent
            return
        overrides = shlex.join(content["arguments"])
        other = other or (
            f"resume=auto: a new sweep starts. {path.parent} was interrupted and had the overrides {overrides}. Set "
            f"these to continue it"
        )
        if wanted != "auto":
            raise ConfigError(
                f"resume={wanted}: that sweep's overrides were {overrides}. Set these, or resume=never for a new sweep"
            )
    if other:
        warn(other)
    if (sweep_dir / SWEEP_FILE).exists():
        raise ConfigError(
            f"hydra.sweep.dir={sweep_dir}: the folder has a sweep already. Set "
            f"{argument('resume', str(sweep_dir))} to continue it, or another folder"
        )
    make_folder(sweep_dir)
    with lock_run_folder(sweep_dir):
        _note_sweep(sweep_dir, arguments, finished=False)
        yield sweep_dir


def end_sweep(sweep_dir: Path) -> None:
    """Mark the sweep as finished: ``resume=auto`` does not continue it."""
    arguments = foreign_files.read_json(sweep_dir / SWEEP_FILE)["arguments"]
    _note_sweep(sweep_dir, arguments, finished=True)


def _note_sweep(sweep_dir: Path, arguments: Sequence[str], finished: bool) -> None:
    write_json(sweep_dir / SWEEP_FILE, {"arguments": list(arguments), "finished": finished})


def _is_free(folder: Path) -> bool:
    """Whether the folder is valid and no process uses it."""
    try:
        return not is_locked(folder)
    except StorageError as error:
        warn(f"{error}. The sweep is skipped")
        return False


def _sweep_content(path: Path) -> dict[str, Any] | None:
    """The content of a sweep file: ``arguments`` and ``finished``. None if the file is damaged."""
    try:
        content: dict[str, Any] = foreign_files.read_json(path)
        words = content["arguments"] if {"arguments", "finished"} <= content.keys() else [None]
        return content if all(type(word) is str for word in words) else None
    except UNREADABLE:
        return None


def _sweeps(wanted: str) -> list[Path]:
    """The sweep files that match ``resume``, newest first; empty for ``never`` and for a single run."""
    if wanted == "never":
        return []
    if wanted == "auto":
        return sorted(OUTPUTS.rglob(SWEEP_FILE), key=lambda path: path.stat().st_mtime, reverse=True)
    folder = find_folder(wanted, SWEEP_FILE)
    return [folder / SWEEP_FILE] if folder else []
