"""Find a run or a sweep by its folder, by its MLflow id, or as ``latest``."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cifar_exp.errors import ConfigError
from cifar_exp.records import journal
from cifar_exp.records.checkpoint_files import manifests
from cifar_exp.records.folder_check import check_folder
from cifar_exp.records.journal import RUN_ID_FILE
from cifar_exp.records.run_folder import CHECKPOINTS, OUTPUTS, RUN_FILE, SWEEP_RUN_FILE

LATEST = "latest"


def find_run(name: str, setting: str = "run", with_checkpoint: bool = False) -> Path:
    """The folder of a run.

    Args:
        name: ``latest``, a folder, or an MLflow run id.
        setting: what the user set to ``name``, for the message.
        with_checkpoint: find runs that can be predicted with. Such a folder may hold nothing but ``config.yaml`` and
            ``checkpoints/``.

    Raises:
        ConfigError: where there is no such run.
        StorageError: where a file of the run is a link, or no regular file.
    """
    marker_file = CHECKPOINTS if with_checkpoint else RUN_FILE
    if name == LATEST:
        paths = list(OUTPUTS.rglob(marker_file))
        if with_checkpoint:
            paths = [path for folder in paths for path in manifests(folder.parent)]
        paths = [path for path in paths if path.is_file()]
        found = sorted(paths, key=lambda path: path.stat().st_mtime)
        if not found:
            what = "run with a checkpoint" if with_checkpoint else "run"
            raise ConfigError(f"{setting}={LATEST}: there is no {what} under {OUTPUTS}/ yet. Run cifar-exp first")
        return checked(found[-1].parents[1] if with_checkpoint else found[-1].parent)
    for folder in _candidates(name):
        if (folder / marker_file).exists():
            return checked(folder)
    choices = "never, auto, latest" if setting == "resume" else LATEST
    raise ConfigError(
        f"{setting}={name}: there is no such run under {OUTPUTS}/. Set {setting}= to {choices}, the folder of a run, "
        f"or an MLflow run id"
    )


def find_folder(name: str, marker_file: str = SWEEP_RUN_FILE) -> Path | None:
    """The folder of a sweep, or of a run: ``latest``, a folder, or an MLflow run id; None where this disk has none.

    ``marker_file``: a folder with this file is such a folder.
    """
    if name == LATEST:
        found = sorted(OUTPUTS.rglob(marker_file), key=lambda path: path.stat().st_mtime)
        return found[-1].parent if found else None
    with suppress(OSError):  # a name that no file can have
        return next((folder for folder in _candidates(name) if (folder / marker_file).exists()), None)
    return None


def checked(folder: Path) -> Path:
    """``folder``, once :func:`check_folder` has found nothing wrong."""
    check_folder(folder)
    return folder


def _candidates(name: str) -> Iterator[Path]:
    """The folder ``name``, then the folders under ``outputs/`` with that MLflow run id."""
    with suppress(OSError):  # a name that no file can have
        if Path(name).is_dir():
            yield Path(name)
    for path in OUTPUTS.rglob(RUN_ID_FILE):
        with suppress(OSError, ValueError):  # that folder is not the one, or not to be read
            if journal.run_id(path.parent) == name:
                yield path.parent
