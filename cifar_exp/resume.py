"""What a run goes on from: its own folder after an interruption, or another run's checkpoint."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from cifar_exp import checkpoint, journal
from cifar_exp.checkpoint import Manifest
from cifar_exp.config import flattened, shown
from cifar_exp.errors import ConfigError, DataError, StorageError
from cifar_exp.schema import Config
from cifar_exp.tracking import OUTPUTS, RUN_FILE, RUN_ID_FILE, without_password

CONFIG_FILE = "config.yaml"
SWEEP_FILE = "sweep.json"
MULTIRUN_FILE = "multirun.yaml"  # Hydra's name for a sweep's composed configuration
# These change neither what is trained nor how: a run may go on with others.
INCIDENTAL = ("resume", "progress", "trusted_modules", "tracking", "checkpoint", "launcher")
INCIDENTAL_DATA = ("data.residency", "data.workers")  # the batches are the same


@dataclass(frozen=True)
class Resumption:
    """What a run continues.

    Attributes:
        run_dir: the folder of the run that is continued.
        manifest: the checkpoint to start from; None where the run was stopped before its first.
        elapsed: seconds that the run took before; 0 where a new run starts from another one's checkpoint.
        finished: whether nothing is left to train.
        changes: settings that differ from those of the run that is continued: (then, now).
    """

    run_dir: Path
    manifest: Manifest | None
    elapsed: float
    finished: bool
    changes: Mapping[str, tuple[Any, Any]]

    @property
    def in_place(self) -> bool:
        """Whether the run itself goes on, in its folder; with other settings a new one starts from its checkpoint."""
        return not self.changes

    @property
    def kept_batch(self) -> int | None:
        """Images a step of the checkpoint, which stay on any number of devices; None where another batch was typed."""
        if self.manifest is None or {"train.batch_size", "train.scaling"} & self.changes.keys():
            return None
        return self.manifest.global_batch_size

    def check_images(self, data_hash: str) -> None:
        """Raise a DataError where a run would go on with other images than it began with."""
        if self.in_place and self.manifest and self.manifest.data_hash != data_hash:
            raise DataError(
                f"data: the images are not those that {self.run_dir} was trained on. Restore them, or type resume=never"
            )

    def description(self, world_size: int) -> list[str]:
        """What goes on, from where, and what is different now, in lines."""
        folder = os.path.relpath(self.run_dir)
        if self.manifest is None:
            return [f"{folder} was stopped before its first checkpoint: it starts again"]
        verb = "goes on" if self.in_place else "is where this new run starts,"
        lines = [f"{folder} {verb} after epoch {self.manifest.epoch} (step {self.manifest.step})"]
        lines += [f"  {name}: {shown(then)} then, {shown(now)} now" for name, (then, now) in self.changes.items()]
        if self.manifest.world_size != world_size:
            batch = self.kept_batch
            same = f": {batch} images a step in the same order, {batch // world_size} a device" if batch else ""
            lines.append(f"  {self.manifest.world_size} device(s) then, {world_size} now{same}")
        return lines


def config_hash(config: Config) -> str:
    """sha256 in hex of every setting that bears on the result."""
    settings = {name: value for name, value in _settings(asdict(config)).items() if not _is_incidental(name)}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def find(config: Config, run_dir: Path, anywhere: bool, warn: Callable[[str], None]) -> Resumption | None:
    """What ``config.resume`` asks to continue; None for a run that starts from the beginning.

    Args:
        config: of the run that is about to start.
        run_dir: the folder it was given.
        anywhere: whether ``auto`` looks for an interrupted run under ``outputs/`` where ``run_dir`` holds none.
        warn: called with a line for each damaged checkpoint.

    Raises:
        ConfigError: where there is no such run, or it cannot go on with these settings.
        StorageError: where all its checkpoints are damaged.
    """
    if config.resume == "never":
        return None
    folder: Path | None
    if config.resume != "auto":
        folder = _named(config.resume)
    elif (run_dir / RUN_FILE).exists():
        folder = run_dir
    else:
        folder = _interrupted(config_hash(config)) if anywhere else None
    return None if folder is None else _resumption(folder, config, warn)


def claim(run_dir: Path) -> FileLock:
    """Hold a run's folder until this process ends, however it does.

    Raises:
        ConfigError: where another process is training in it.
    """
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ConfigError(f"{run_dir}: another process is training in this folder. Wait for its end") from error
    return lock


def is_finished(run_dir: Path) -> bool:
    """Whether the run in ``run_dir`` came to its end."""
    return "time/total_seconds" in journal.last_values(run_dir)


def begin_sweep(sweep_dir: Path, wanted: str, arguments: Sequence[str]) -> Path:
    """The folder of the sweep that these arguments ask for: an interrupted one's, or ``sweep_dir``, made for a new one.

    Args:
        sweep_dir: for a new sweep.
        wanted: ``resume``: never, auto, or the folder or MLflow run id of a sweep or a run.
        arguments: the sweep's overrides.

    Raises:
        ConfigError: where the sweep that ``wanted`` names was one of other jobs.
    """
    arguments = [argument for argument in arguments if not _is_incidental(argument.lstrip("+~").partition("=")[0])]
    for path in _sweeps(wanted):
        content = json.loads(path.read_text())
        if content["arguments"] == arguments and not (wanted == "auto" and content["finished"]):
            return path.parent
        if wanted != "auto":
            raise ConfigError(
                f"resume={wanted}: that sweep's overrides were {' '.join(content['arguments'])}. Type these"
            )
    sweep_dir.mkdir(parents=True, exist_ok=True)
    _note_sweep(sweep_dir, arguments, finished=False)
    return sweep_dir


def end_sweep(sweep_dir: Path) -> None:
    """Leave word that all jobs came to their end."""
    arguments = json.loads((sweep_dir / SWEEP_FILE).read_text())["arguments"]
    _note_sweep(sweep_dir, arguments, finished=True)


def _note_sweep(sweep_dir: Path, arguments: Sequence[str], finished: bool) -> None:
    content = {"arguments": list(arguments), "finished": finished}
    temporary = sweep_dir / f"{SWEEP_FILE}.tmp"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(sweep_dir / SWEEP_FILE)


def _sweeps(wanted: str) -> list[Path]:
    """The sweep files that ``resume`` may mean, newest first; none for ``never`` or where it names a single run."""
    if wanted == "never":
        return []
    if wanted == "auto":
        return sorted(OUTPUTS.rglob(SWEEP_FILE), key=lambda path: path.stat().st_mtime, reverse=True)
    named = [Path(wanted), *(path.parent for path in OUTPUTS.rglob(RUN_ID_FILE) if path.read_text().strip() == wanted)]
    return [folder / SWEEP_FILE for folder in named if (folder / SWEEP_FILE).exists()]


def _resumption(folder: Path, config: Config, warn: Callable[[str], None]) -> Resumption:
    changes = _changes(folder, config)
    finished = is_finished(folder) and not changes
    manifest = None if finished else checkpoint.sound(folder, warn)
    entries = journal.read(folder)
    if manifest is None and not finished:
        if changes:
            raise ConfigError(f"resume={config.resume}: {folder} has no checkpoint to start from. Type resume=never")
        if any("val/accuracy" in entry.metrics and entry.epoch % config.checkpoint.every == 0 for entry in entries):
            raise StorageError(
                f"{folder / checkpoint.FOLDER}: the run has trained whole epochs and its checkpoints are gone. Restore "
                f"them, or type resume=never to start again from the beginning"
            )
    if manifest is not None and changes:
        _check_changes(config, manifest, changes)
    elapsed = entries[-1].time if entries and not changes else 0.0
    return Resumption(folder, manifest, elapsed, finished, changes)


def _check_changes(config: Config, manifest: Manifest, changes: Mapping[str, tuple[Any, Any]]) -> None:
    for name, (then, _) in changes.items():
        if name.startswith("model.") or name == "optimizer._target_":
            raise ConfigError(
                f"{name}: the checkpoint was trained with {shown(then)}, and its state fits nothing else. Type "
                f"{name}={shown(then)}, or resume=never"
            )
    if manifest.epoch >= config.train.epochs:
        raise ConfigError(
            f"train.epochs={config.train.epochs}: the checkpoint has {manifest.epoch} epochs already. Type "
            f"train.epochs={manifest.epoch + 1} or more"
        )


def _named(name: str) -> Path:
    """The folder of a run, by its path or MLflow run id."""
    if (Path(name) / RUN_FILE).exists():
        return Path(name)
    for path in OUTPUTS.rglob(RUN_ID_FILE):
        if path.read_text().strip() == name and (path.parent / RUN_FILE).exists():
            return path.parent
    raise ConfigError(
        f"resume={name}: there is no such run. Type never, auto, the folder of a run under {OUTPUTS}/, or an MLflow "
        f"run id"
    )


def _interrupted(wanted: str) -> Path | None:
    """The newest run under ``outputs/`` with this configuration that has not come to its end and is not running."""
    found = sorted(OUTPUTS.rglob(RUN_FILE), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        if json.loads(path.read_text()).get("config_hash") == wanted and not is_finished(path.parent):
            try:
                claim(path.parent).release()
            except ConfigError:
                continue
            return path.parent
    return None


def _changes(folder: Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that bear on the result and differ from those of the run in ``folder``: (then, now)."""
    then: Any = OmegaConf.to_container(OmegaConf.load(folder / CONFIG_FILE))
    before, now = _settings(then), _settings(without_password(asdict(config)))
    return {
        name: (before.get(name), now.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not _is_incidental(name)
    }


def _is_incidental(name: str) -> bool:
    return name.partition(".")[0] in INCIDENTAL or name in INCIDENTAL_DATA


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings, tuples as the lists that JSON and YAML make of them."""
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return flattened(plain)
