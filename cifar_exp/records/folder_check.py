"""Check a run's or sweep's folder before a file in it is read or written: it is untrusted.

A link in the folder could make this program show, send or overwrite a file elsewhere. Reading a FIFO would never end.
"""

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cifar_exp.errors import StorageError
from cifar_exp.system.printable import printable

# Subfolders of a run folder whose files are read or written.
FOLDERS = ("checkpoints", ".hydra")
# Names of files that a run or a sweep reads or writes, and suffixes of such names.
FILES = frozenset(
    (
        *("config.yaml", "run.json", "outcome.json", "metrics.jsonl", "mlflow_run_id", ".undelivered", ".lock", "stop"),
        *("sweep.json", "sweep_run.json", "multirun.yaml", ".mlflow.lock"),
        *("progress.html", "training.png", "trace.json.gz", "model.safetensors"),
        *("speedup.csv", "speedup.png", "speedup.html"),
    )
)
ENDS = (".log", ".cifar-exp-tmp", ".json.tmp", ".html.tmp")  # the last two: of versions before 0.2
CHECKPOINT_STARTS = ("step-", ".step-")


def check_folder(folder: Path) -> None:
    """Check that each file of a run or sweep is a regular file in its folder. Other files are left alone.

    Raises:
        StorageError: one is a link, a FIFO, a socket or a device.
    """
    _check_entries(folder, lambda name: name in FILES or name in FOLDERS or name.endswith(ENDS))
    _check_entries(folder / "checkpoints", lambda name: name.startswith(CHECKPOINT_STARTS))
    _check_entries(folder / ".hydra", lambda _: True)


def check_job_folders(sweep_dir: Path) -> None:
    """Check that the job folders of a sweep are no links, since jobs are continued in them.

    Raises:
        StorageError: one is a link.
    """
    _check_entries(sweep_dir, lambda name: (sweep_dir / name).is_dir())


def _check_entries(folder: Path, is_ours: Callable[[str], bool]) -> None:
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode) or not is_ours(entry.name):
                continue
            path = printable(entry.path)
            if stat.S_ISLNK(mode):
                target = printable(Path(entry.path).readlink())
                raise StorageError(
                    f"{path}: it is a link to {target}. A run folder may come from anybody, so its links are not "
                    f"followed. Put a copy in its place, or remove it"
                )
            raise StorageError(f"{path}: it is not a regular file (a FIFO, a socket or a device). Remove it")
