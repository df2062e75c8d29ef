"""Find a run or a sweep by its folder, by its MLflow id, or as ``latest``."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cifar_exp.errors import ConfigError
from cifar_exp.records import journal
from cifar_exp.records.checkpoint_files import manifests
from cifar_exp.records.folder_check import check_folder
from cifar_exp.records.journal import RUN_ID_FILE
from cifar_exp.records.run_folder import CHECKPOINTS, OUTPUTS, RUN_FILE

LATEST = "latest"


def find_run(name: str, setting: str = "run", with_checkpoint: bool = False) -> Path:
    """The folder of a run.

    Args:
        name: ``latest``, a folder, or an MLflow run id.
        setting: what the user set to ``name``, for the message.
        with_checkpoint: find a run to predict with. Its folder may hold only ``config.yaml`` and ``checkpoints/``.

    Raises:
        ConfigError: there is no such run.
        StorageError: a file of the run is a link, or no regular file.
    """
    folder = find_folder(name, CHECKPOINTS if with_checkpoint else RUN_FILE)
    if folder:
        return checked(folder)
    if name == LATEST:
        what = "run with a checkpoint" if with_checkpoint else "run"
        raise ConfigError(f"{setting}={LATEST}: there is no {what} under {OUTPUTS}/ yet. Run cifar-exp first")
    choices = "never, auto, latest" if setting == "resume" else LATEST
    raise ConfigError(
        f"{setting}={name}: there is no such run under {OUTPUTS}/. Set {setting}= to {choices}, the folder of a run, "
        f"or an MLflow run id"
    )


def find_runs(name: str, *marker_files: str) -> Path:
    """The folder with the runs to read: ``name`` itself if it is a folder, else the run or sweep with this id, or the
    latest.

    Args:
        name: ``latest``, a folder, or an MLflow run id.
        marker_files: as for :func:`find_folder`; the first one that is found decides.

    Returns:
        The folder, or ``name`` as a path if there is none.
    """
    if name != LATEST and _is_folder(name):
        return Path(name)
    found = (find_folder(name, marker_file) for marker_file in marker_files)
    return next(filter(None, found), Path(name))


def find_folder(name: str, marker_file: str) -> Path | None:
    """The folder of a run or a sweep; None if there is none on this disk.

    Args:
        name: ``latest``, a folder, or an MLflow run id.
        marker_file: the folder must contain a file or folder of this name.
    """
    if name == LATEST:
        changed = {path.parent: _changed(path) for path in OUTPUTS.rglob(marker_file)}
        found = {folder: seconds for folder, seconds in changed.items() if seconds is not None}
        return max(found, key=found.__getitem__, default=None)
    return next((folder for folder in _candidates(name) if (folder / marker_file).exists()), None)


def _changed(marker: Path) -> float | None:
    """When the marker was last written, in seconds since the epoch. For ``checkpoints/``: when a checkpoint was."""
    files = manifests(marker.parent) if marker.name == CHECKPOINTS else [marker]
    return max((path.stat().st_mtime for path in files if path.is_file()), default=None)


def checked(folder: Path) -> Path:
    """Run :func:`check_folder`, then return ``folder``."""
    check_folder(folder)
    return folder


def _candidates(name: str) -> Iterator[Path]:
    """The folder ``name``, then the folders under ``outputs/`` with that MLflow run id."""
    if _is_folder(name):
        yield Path(name)
    for path in OUTPUTS.rglob(RUN_ID_FILE):
        with suppress(OSError, ValueError):  # not that run, or unreadable
            if journal.run_id(path.parent) == name:
                yield path.parent


def _is_folder(name: str) -> bool:
    with suppress(OSError, ValueError):  # a name that no file can have
        return Path(name).is_dir()
    return False
