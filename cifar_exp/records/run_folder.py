"""Files of the run folder: lock, ``run.json``, ``outcome.json``, ``.undelivered``.

Everything that MLflow gets is written here first, so that it can be delivered after an outage.
"""

import os
import shlex
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cifar_exp.errors import ConfigError, StorageError, storage_errors
from cifar_exp.records import journal
from cifar_exp.records.folder_check import check_folder
from cifar_exp.records.stored_facts import OUTCOME_FACTS, RUN_FACTS, reason
from cifar_exp.system import foreign_files, locks
from cifar_exp.system.atomic_files import write_atomically, write_json
from cifar_exp.system.folder_place import place_of
from cifar_exp.system.process import uv_prefix
from cifar_exp.system.redaction import masked

Status = Literal["FINISHED", "FAILED", "KILLED"]
OUTPUTS = Path("outputs")
CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"  # the folder of checkpoints
LOCK_FILE = ".lock"  # held by the process that trains in the folder
UNDELIVERED_FILE = ".undelivered"  # in a run folder: names the store that still lacks points of it
SWEEP_RUN_FILE = "sweep_run.json"  # in a sweep's folder: facts of its parent run
MULTIRUN_FILE = "multirun.yaml"  # Hydra's name for a sweep's composed configuration
OUTCOME_FILE = "outcome.json"


@dataclass(frozen=True)
class RunInfo:
    """The facts that a tracker gets when a run opens.

    Attributes:
        name: shown in lists of runs.
        run_dir: the run's folder.
        params: the resolved configuration, flattened, without secrets.
        tags: device count, accelerator, sweep.
        started: when the run began, seconds since the epoch.
        artifacts: names of files in the run's folder to store with the run at its end, if they exist.
        sweep_dir: the folder of the run's sweep; None for a single run.
        started_from: folder and step of the checkpoint that a new run started from; None for a run from scratch.
        key: unique key by which a tracker recognises the run after a lost response; empty in old runs.
        sessions: random ids of the run's sessions, the current one last; empty if nothing is trained.
    """

    name: str
    run_dir: Path
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    started: float
    artifacts: Sequence[str] = ()
    sweep_dir: Path | None = None
    started_from: tuple[Path, int] | None = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    sessions: tuple[str, ...] = ()

    def save(self, config_hash: str) -> None:
        """Write it to the run's folder."""
        more = {"config_hash": config_hash, "config_hashes": [config_hash], "sessions": list(self.sessions)}
        self._write(RUN_FILE, more)

    def save_sweep(self) -> None:
        """Write it to a sweep's folder."""
        self._write(SWEEP_RUN_FILE, {})

    def _write(self, name: str, more: Mapping[str, Any]) -> None:
        content = {"name": self.name, "key": self.key, "started": self.started, "tags": dict(self.tags)}
        if self.sweep_dir:
            content["sweep_dir"] = os.path.relpath(self.sweep_dir, self.run_dir)
        if self.started_from:
            folder, step = self.started_from
            content["origin"] = {"folder": os.path.relpath(folder, self.run_dir), "step": step}
        content |= {"artifacts": list(self.artifacts), "params": masked(self.params), **more}
        content["place"] = place_of(self.run_dir)
        write_json(self.run_dir / name, content)

    @classmethod
    def load(cls, folder: Path) -> "RunInfo":
        """The facts that :meth:`save` or :meth:`save_sweep` wrote. The folder may come from another user.

        A sweep folder must be a parent of the run folder.

        Raises:
            StorageError: the facts are missing or unreadable, or name a file outside the folder.
        """
        path = next((path for path in (folder / RUN_FILE, folder / SWEEP_RUN_FILE) if path.exists()), folder / RUN_FILE)
        try:
            content = RUN_FACTS.validate_python(foreign_files.read_json(path))
            sweep_dir, origin = content.get("sweep_dir"), content.get("origin")
            return cls(
                name=content["name"],
                run_dir=folder,
                params=content["params"],
                tags=content["tags"],
                started=content.get("started", path.stat().st_mtime),
                artifacts=content.get("artifacts", ()),
                sweep_dir=folder / sweep_dir if sweep_dir and set(Path(sweep_dir).parts) == {".."} else None,
                started_from=(folder / origin["folder"], origin["step"]) if origin else None,
                key=content.get("key", ""),
            )
        except (OSError, ValueError) as error:
            raise StorageError(f"{path}: the run cannot be read: {reason(error)}. Restore that file") from error


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and when (seconds since the epoch)."""

    status: Status
    ended: float

    def save(self, folder: Path) -> None:
        """Write it to the run's folder."""
        write_json(folder / OUTCOME_FILE, vars(self))

    @classmethod
    def of(cls, folder: Path) -> "Outcome | None":
        """How the run ended.

        Without ``outcome.json`` a journal with the total time means FINISHED, and anything else None.
        """
        with suppress(OSError, ValueError):
            return cls(**OUTCOME_FACTS.validate_python(foreign_files.read_json(folder / OUTCOME_FILE)))
        with suppress(OSError, StorageError):
            if is_finished(folder):  # the process died between the last journal line and this file
                return cls("FINISHED", (folder / journal.JOURNAL_FILE).stat().st_mtime)
        return None

    @staticmethod
    def forget(folder: Path) -> None:
        """Remove the outcome: the run in ``folder`` is resumed."""
        (folder / OUTCOME_FILE).unlink(missing_ok=True)


def lock_run_folder(run_dir: Path, patience: float = 0.5) -> locks.Held:
    """Lock a run folder until this process ends. The kernel releases the lock even if the process is killed.

    Args:
        run_dir: the folder.
        patience: seconds to wait for another process, which may only be testing the lock.

    Raises:
        ConfigError: another process is training in it.
        StorageError: a file of the run is a link or not a regular file, or the lock cannot be opened.
    """
    check_folder(run_dir)
    lock = run_dir / LOCK_FILE
    try:
        with storage_errors(lock, "Remove it if it does not belong to a run, or set hydra.run.dir=<another folder>"):
            return locks.acquire(lock, patience)
    except locks.HeldError as error:
        gone = f", or remove {error.marker} if that process is gone" if error.marker else ""
        raise ConfigError(
            f"{run_dir}: another process is training in this folder ({error.holder}). Wait for its end{gone}"
        ) from error


def is_locked(folder: Path) -> bool:
    """Whether a living process holds the folder's lock. The lock file itself stays when the process ends."""
    try:
        locks.acquire(folder / LOCK_FILE).release()
    except locks.HeldError:
        return True
    except OSError:  # a folder that can only be read
        return False
    return False


def is_finished(run_dir: Path) -> bool:
    """Whether the journal has ``time/total_seconds``, the parent's last line. ``outcome.json`` is not read."""
    return "time/total_seconds" in journal.last_values(run_dir)


def mark_undelivered(run_dir: Path, store: str) -> None:
    """Note in the run folder that ``store`` may lack a part of the run."""
    path = run_dir / UNDELIVERED_FILE
    with suppress(OSError):  # later writes report the error
        if not path.exists():  # another store may still lack a part
            write_atomically(path, store)


def is_undelivered(run_dir: Path) -> bool:
    """Whether some store lacks a part of the run."""
    return (run_dir / UNDELIVERED_FILE).exists()


def mark_delivered(run_dir: Path, store: str) -> str:
    """Note that ``store`` has everything. Returns the store that still lacks a part, or an empty string."""
    path = run_dir / UNDELIVERED_FILE
    with suppress(OSError):
        owed = foreign_files.read_text(path)
        if owed not in ("", store):
            return owed
        path.unlink()
    return ""


def plain_sync_command(folder: Path) -> str:
    """The `cifar-exp sync` command for a run or a sweep, without a store."""
    return f"{uv_prefix()}cifar-exp sync {shlex.quote(os.path.relpath(folder))}"


def make_folder(folder: Path) -> None:
    """Create the folder of a run or a sweep, and ``outputs/`` if it is missing, with mode 0700: only for this user.

    Existing folders keep their mode. Other parents get the default mode, since they may be shared.
    """
    for new in (OUTPUTS, folder):
        if folder.absolute().is_relative_to(new.absolute()):
            new.parent.mkdir(parents=True, exist_ok=True)
            new.mkdir(mode=0o700, exist_ok=True)


def make_job_private(folder: Path) -> None:
    """Set the mode of a sweep's job folder to 0700 right after Hydra has created it.

    A folder that already has other files, or files of an earlier start, keeps its mode.
    """
    with suppress(OSError):  # another user's folder, or a file system without modes
        names = {path.name for path in folder.iterdir()}
        is_new = all(name.startswith(".") or name.endswith(".log") for name in names) and LOCK_FILE not in names
        if is_new and not Path.cwd().is_relative_to(folder.resolve()):
            folder.chmod(0o700)
