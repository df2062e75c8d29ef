"""Prepare a run: find its devices, the run to resume, and its folder."""

import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cifar_exp.config.defaults import flattened
from cifar_exp.config.schema import Config
from cifar_exp.launch.devices import DeviceSet, find_devices
from cifar_exp.launch.host_settings import host_range
from cifar_exp.records import journal, model_export
from cifar_exp.records.run_folder import CONFIG_FILE, RUN_FILE, RunInfo
from cifar_exp.runs import resume
from cifar_exp.runs.announce import warn
from cifar_exp.runs.config_changes import config_hash
from cifar_exp.runs.context import RunContext
from cifar_exp.runs.resume import Resumption
from cifar_exp.system import machine
from cifar_exp.system.accelerator import check_precision
from cifar_exp.system.locks import Owner
from cifar_exp.system.printable import printable
from cifar_exp.system.redaction import masked
from cifar_exp.system.scheduler import job_tags, requeued
from cifar_exp.training.plan import check_scaling
from cifar_exp.worker.train_job import TRACE_FILE

ARTIFACTS = (CONFIG_FILE, "progress.html", "training.png", journal.JOURNAL_FILE, TRACE_FILE, model_export.MODEL_FILE)


@dataclass(frozen=True)
class PreparedRun:
    """A run before its folder is locked.

    Attributes:
        devices: the devices that it trains on.
        folder: the run folder.
        resumed: the run and checkpoint that it continues; None for a new run.
        title: the network and the dataset.
        config_hash: hash of the settings that affect the result.
        info: its name, tags and params.
        started: start on the monotonic clock, shifted so that ``now - started`` leaves out interruptions.
    """

    devices: DeviceSet
    folder: Path
    resumed: Resumption | None
    title: str
    config_hash: str
    info: RunInfo
    started: float

    @property
    def is_new(self) -> bool:
        """Whether the run gets a new folder, perhaps to start from another run's checkpoint."""
        return self.resumed is None or not self.resumed.in_place


def prepare(config: Config, context: RunContext) -> PreparedRun:
    """Find the devices, and the run to resume if there is one.

    Raises:
        MachineError: the devices do not exist or do not support the precision.
        ConfigError: the run to resume does not exist or does not match the settings, or the ranks cannot share the
            batch.
        StorageError: the run to resume cannot be read.
    """
    devices = find_devices(config.devices, host_range(config.launcher.get("hosts"))[1])
    check_precision(config.train.precision, devices.accelerator)
    resumed = resume.find(_wanted(config, context), context.folder, anywhere=context.is_single, warn=warn)
    is_finished = resumed is not None and resumed.finished
    is_batch_kept = resumed is not None and resumed.in_place and resumed.kept_batch is not None
    if not is_finished and not is_batch_kept:
        check_scaling(config, devices.world_size)
    folder = context.folder
    if resumed and resumed.in_place and not is_finished:
        folder = _continued_folder(resumed.run_dir, folder)
    name = title(config)
    info = _run_info(config, name, devices, folder, context, resumed)
    started = time.monotonic() - context.age - (resumed.elapsed if resumed else 0.0)
    return PreparedRun(devices, folder, resumed, name, config_hash(config), info, started)


def title(config: Config) -> str:
    """The network and the dataset, such as ``convnet 32x4 on cifar10``."""
    model = config.model["_target_"].rpartition(".")[2]
    size = "x".join(str(config.model[key]) for key in ("width", "depth") if key in config.model)
    data = config.data["_target_"].rpartition(".")[2]
    if data in ("folders", "shards"):  # the root folder's name says more
        data = Path(config.data["root"]).resolve().name
    return printable(f"{model} {size} on {data}".replace("  ", " "))


def _wanted(config: Config, context: RunContext) -> Config:
    """The configuration, with ``resume=auto`` for a requeued job: the scheduler repeats the same command."""
    if config.resume != "never" or "resume=never" in context.overrides:
        return config
    is_begun = (context.folder / RUN_FILE).exists()
    job = requeued(RunInfo.load(context.folder).tags if is_begun else None)
    if is_begun and job:
        warn(f"{job}: the job was requeued, and its run continues")
        return replace(config, resume="auto")
    if context.is_single and job:
        warn(
            f"{job}: the job was requeued, and trains from the beginning in {context.folder}. Set resume=auto, or "
            f"hydra.run.dir to a fixed folder, in its script to continue"
        )
    return config


def _continued_folder(folder: Path, hydras: Path) -> Path:
    """Move Hydra's log into the resumed run's folder, delete Hydra's new folder, and return ``folder``."""
    if folder.resolve() != hydras.resolve():
        root = logging.getLogger()
        for handler in [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]:
            log = Path(handler.baseFilename)
            moved = logging.FileHandler(folder / log.name)
            moved.setFormatter(handler.formatter)
            root.removeHandler(handler)
            root.addHandler(moved)
            handler.close()
            log.unlink(missing_ok=True)
        for empty in (hydras, hydras.parent):
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()
    return folder


def _run_info(
    config: Config, title: str, devices: DeviceSet, run_dir: Path, context: RunContext, resumed: Resumption | None
) -> RunInfo:
    tags = {"devices": str(devices.world_size), "accelerator": devices.accelerator}
    if devices.hosts > 1:
        tags["hosts"] = str(devices.hosts)
    tags["oversubscribed"] = str(devices.oversubscribed).lower()
    tags["host"] = Owner.here().host  # parallel jobs of a sweep on one host disturb each other
    tags |= job_tags()
    tags |= machine.description(devices.accelerator, devices.world_size // devices.hosts)
    overrides = masked([override for override in context.overrides if not override.startswith("resume=")])
    tags["overrides"] = printable(" ".join(overrides))
    if resumed and not resumed.in_place:
        tags["resumed_from"] = journal.run_id(resumed.run_dir) or resumed.run_dir.as_posix()
    if context.sweep_dir:
        tags["sweep"] = context.sweep_dir.as_posix()
    name = f"{title}, {devices.world_size} x {devices.accelerator}"
    if devices.hosts > 1:
        name += f" on {devices.hosts} hosts"
    started_from = None
    if resumed and resumed.manifest and not resumed.in_place:
        started_from = resumed.source, resumed.manifest.step
    params = flattened(masked(asdict(config)))
    began = time.time() - context.age
    return RunInfo(name, run_dir, params, tags, began, ARTIFACTS, context.sweep_dir, started_from)
