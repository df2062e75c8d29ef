"""Lock the folder of a run, and write its configuration there."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from omegaconf import OmegaConf

from cifar_exp.config.schema import Config
from cifar_exp.distributed.stop_requests import STOP_FILE
from cifar_exp.errors import ConfigError, storage_errors
from cifar_exp.records.journal import JOURNAL_FILE, RUN_ID_FILE
from cifar_exp.records.run_folder import (
    CHECKPOINTS,
    CONFIG_FILE,
    OUTCOME_FILE,
    RUN_FILE,
    RunInfo,
    lock_run_folder,
)
from cifar_exp.records.run_identity import claimed
from cifar_exp.runs.announce import warn
from cifar_exp.runs.prepare import PreparedRun
from cifar_exp.system.atomic_files import write_atomically
from cifar_exp.system.redaction import masked


@contextmanager
def locked_run_folder(prepared: PreparedRun, config: Config) -> Iterator[RunInfo]:
    """Lock the run folder inside the context. For a new run, write its tags and resolved configuration there.

    A stop file that is left from an earlier start is removed: it would end this run at its first step.

    Raises:
        ConfigError: the folder has another run, or another process uses it.
    """
    new = replace(prepared.info, sessions=(uuid.uuid4().hex,))
    chosen = prepared.resumed.lock if prepared.resumed else None
    with chosen or lock_run_folder(new.run_dir):
        if not prepared.is_new:
            _remove_stop_file(new.run_dir)
            run, original = claimed(new.run_dir, prepared.config_hash)
            if original:
                warn(f"{new.run_dir}: it is a copy of {original} and continues as a run of its own")
            yield run
            return
        if (new.run_dir / RUN_FILE).exists():
            raise ConfigError(
                f"hydra.run.dir={new.run_dir}: the folder has a run already, and each run needs its own. "
                f"Set resume=auto to continue it, or another folder, or leave hydra.run.dir out for a new one"
            )
        resolved = OmegaConf.to_yaml(OmegaConf.create(masked(asdict(config))))
        _refuse_to_overwrite(new, resolved)
        _remove_stop_file(new.run_dir)
        write_atomically(new.run_dir / CONFIG_FILE, resolved)
        new.save(prepared.config_hash)  # last, so that every run that can be found has its configuration
        yield new


def _refuse_to_overwrite(run: RunInfo, resolved: str) -> None:
    """Check that a new run would not overwrite files in its folder.

    An identical resolved configuration is accepted: a start that was killed before its run began has left it.
    """
    folder = run.run_dir
    for name in (*run.artifacts, JOURNAL_FILE, RUN_ID_FILE, OUTCOME_FILE, CHECKPOINTS):
        path = folder / name
        if path.is_symlink() or (
            path.exists() and not (name == CONFIG_FILE and path.read_bytes() == resolved.encode())
        ):
            raise ConfigError(
                f"hydra.run.dir={folder}: the folder has {name}, which the run would overwrite or add to. Set "
                f"hydra.run.dir=<another folder>, or leave it out for a new one"
            )


def remove_new_run(prepared: PreparedRun) -> None:
    """Remove what :func:`locked_run_folder` wrote for a new run. The lock stays until it is released."""
    if prepared.is_new:
        for name in (CONFIG_FILE, RUN_FILE):
            (prepared.folder / name).unlink(missing_ok=True)


def _remove_stop_file(run_dir: Path) -> None:
    stop = run_dir / STOP_FILE
    if stop.is_file():
        with storage_errors(stop, f"Remove {stop}"):
            stop.unlink()
        warn(f"{stop}: removed. It was there before this start; create it while the run trains to end training")
