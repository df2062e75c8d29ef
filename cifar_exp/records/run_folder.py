"""A run's folder: who is at work in it, what trackers are told of the run, and how it ended.

All of it is on disk before any tracker hears of it, so that a tracker that could not be reached can be told later.
"""

import json
import os
import shlex
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from cifar_exp.errors import ConfigError, StorageError
from cifar_exp.records import journal
from cifar_exp.system import locks
from cifar_exp.system.atomic_files import write_json
from cifar_exp.system.process import uv_prefix
from cifar_exp.system.redaction import masked

Status = Literal["FINISHED", "FAILED", "KILLED"]
OUTPUTS = Path("outputs")
CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
UNDELIVERED_FILE = ".undelivered"  # in a run's folder: the store that was to have it and has not got it whole
SWEEP_RUN_FILE = "sweep_run.json"  # in a sweep's folder: its parent run
MULTIRUN_FILE = "multirun.yaml"  # Hydra's name for a sweep's composed configuration
OUTCOME_FILE = "outcome.json"


@dataclass(frozen=True)
class RunInfo:
    """What a tracker is told of a run when it opens.

    Attributes:
        name: shown in lists of runs.
        run_dir: the run's folder; what ``artifacts`` name lies in it.
        params: the resolved configuration, flattened, without secrets.
        tags: device count, accelerator, sweep.
        started: when the run began, seconds since the epoch.
        artifacts: files of the run's folder to keep with the run at its end, where they exist.
        sweep_dir: the folder of the sweep that the run is a job of.
        origin: folder and step of the checkpoint that a new run started from; None where it was none.
        key: the run's own, by which a tracker knows it again whatever became of an earlier answer; empty in old runs.
    """

    name: str
    run_dir: Path
    params: Mapping[str, Any]
    tags: Mapping[str, str]
    started: float
    artifacts: Sequence[str] = ()
    sweep_dir: Path | None = None
    origin: tuple[Path, int] | None = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def save(self, config_hash: str) -> None:
        """Leave it in the run's folder, where reports and later tools find it."""
        self._write(RUN_FILE, {"config_hash": config_hash})

    def save_sweep(self) -> None:
        """Leave it in a sweep's folder."""
        self._write(SWEEP_RUN_FILE, {})

    def _write(self, name: str, more: Mapping[str, str]) -> None:
        content = {"name": self.name, "key": self.key, "started": self.started, "tags": dict(self.tags)}
        if self.sweep_dir:
            content["sweep_dir"] = os.path.relpath(self.sweep_dir, self.run_dir)
        if self.origin:
            folder, step = self.origin
            content["origin"] = {"folder": os.path.relpath(folder, self.run_dir), "step": step}
        content |= {"artifacts": list(self.artifacts), "params": masked(self.params), **more}
        write_json(self.run_dir / name, content)

    @classmethod
    def load(cls, folder: Path) -> "RunInfo":
        """What :meth:`save` or :meth:`save_sweep` has left in a folder.

        Raises:
            StorageError: where there is nothing that can be read.
        """
        path = next((path for path in (folder / RUN_FILE, folder / SWEEP_RUN_FILE) if path.exists()), folder / RUN_FILE)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                name=content["name"],
                run_dir=folder,
                params=content["params"],
                tags=content["tags"],
                started=content.get("started", path.stat().st_mtime),
                artifacts=content.get("artifacts", ()),
                sweep_dir=folder / content["sweep_dir"] if "sweep_dir" in content else None,
                origin=(folder / begun["folder"], int(begun["step"])) if (begun := content.get("origin")) else None,
                key=content.get("key", ""),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{path}: the run cannot be read: {error!r}. Restore that file") from error


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and when, seconds since the epoch."""

    status: Status
    ended: float

    def save(self, folder: Path) -> None:
        """Leave it in the run's folder."""
        write_json(folder / OUTCOME_FILE, vars(self))

    @classmethod
    def of(cls, folder: Path) -> "Outcome | None":
        """How the run in ``folder`` ended; None where it has not, or its process died before it could tell."""
        with suppress(OSError, ValueError, TypeError):
            return cls(**json.loads((folder / OUTCOME_FILE).read_text()))
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            if is_finished(folder):  # and died between its last line and the file
                return cls("FINISHED", (folder / journal.JOURNAL_FILE).stat().st_mtime)
        return None

    @staticmethod
    def forget(folder: Path) -> None:
        """The run in ``folder`` goes on."""
        (folder / OUTCOME_FILE).unlink(missing_ok=True)


def claim(run_dir: Path, patience: float = 0.5) -> FileLock:
    """Hold a run's folder until this process ends, however it does.

    Args:
        run_dir: the folder.
        patience: seconds to wait for another process, which may only be looking whether the folder is free.

    Raises:
        ConfigError: where another process is training in it.
    """
    try:
        return locks.hold(run_dir / ".lock", patience)
    except locks.HeldError as error:
        raise ConfigError(
            f"{run_dir}: another process is training in this folder ({error.holder}). Wait for its end"
        ) from error


def is_claimed(folder: Path) -> bool:
    """Whether a process is at work in the folder."""
    try:
        claim(folder, patience=0).release()
    except ConfigError:
        return True
    return False


def is_finished(run_dir: Path) -> bool:
    """Whether the run in ``run_dir`` came to its end."""
    return "time/total_seconds" in journal.last_values(run_dir)


def owe(run_dir: Path, store: str) -> None:
    """Leave word that ``store`` is to have the run and may not have all of it."""
    path = run_dir / UNDELIVERED_FILE
    with suppress(OSError):  # whoever cannot write here will soon say so
        if not path.exists():  # another store that was left with a part is still owed the rest
            path.write_text(store)


def is_owed(run_dir: Path) -> bool:
    """Whether some store has not got all of the run."""
    return (run_dir / UNDELIVERED_FILE).exists()


def settle(run_dir: Path, store: str) -> str:
    """``store`` has got all of it; the store that has not, if there is one."""
    path = run_dir / UNDELIVERED_FILE
    with suppress(OSError):
        owed = path.read_text()
        if owed not in ("", store):
            return owed
        path.unlink()
    return ""


def sync_command(folder: Path) -> str:
    """What to type to bring what a tracker lacks of a run or a sweep."""
    return f"{uv_prefix()}cifar-exp-sync {shlex.quote(os.path.relpath(folder))}"


def make_private(folder: Path) -> None:
    """Let nobody but the user into a run's or sweep's folder, and into ``outputs/``: mode 0700.

    A folder that held other things before, and the one that the user stands in, are theirs and stay as they are.
    """
    with suppress(OSError):  # another user's folder, or a file system without modes
        if OUTPUTS.is_dir():
            OUTPUTS.chmod(0o700)
        ours = {RUN_FILE, SWEEP_RUN_FILE, OUTCOME_FILE}
        names = {path.name for path in folder.iterdir()}
        foreign = {name for name in names if not name.startswith(".") and not name.endswith(".log")}
        if (not foreign or names & ours) and not Path.cwd().is_relative_to(folder.resolve()):
            folder.chmod(0o700)
