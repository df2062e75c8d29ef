"""Prepare a run: find devices and what to resume, claim the run folder, read the images, make the plan and the job."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from cifar_exp.config.defaults import flattened
from cifar_exp.config.schema import Config
from cifar_exp.data.validation_split import hold_out
from cifar_exp.display.curves import RunFacts
from cifar_exp.distributed.stop_requests import STOP_FILE
from cifar_exp.errors import ConfigError, storage_errors
from cifar_exp.launch.devices import DeviceSet, find_devices
from cifar_exp.records import journal, model_export
from cifar_exp.records.run_folder import CONFIG_FILE, RUN_FILE, RunInfo, lock_run_folder
from cifar_exp.runs import config_changes, resume, summary
from cifar_exp.runs.announce import say, warn
from cifar_exp.runs.components import Parts
from cifar_exp.runs.context import RunContext
from cifar_exp.runs.job_setup import new_job, title
from cifar_exp.runs.model_check import check_scales, checked_model
from cifar_exp.runs.resume import Resumption
from cifar_exp.system import machine
from cifar_exp.system.accelerator import check_precision
from cifar_exp.system.atomic_files import write_atomically
from cifar_exp.system.printable import printable
from cifar_exp.system.redaction import masked
from cifar_exp.training.plan import Plan, check_scaling, make_plan, warnings
from cifar_exp.worker.job import Job
from cifar_exp.worker.train_job import TRACE_FILE

ARTIFACTS = (CONFIG_FILE, "progress.html", "training.png", journal.JOURNAL_FILE, TRACE_FILE, model_export.MODEL_FILE)


@dataclass(frozen=True)
class Beginning:
    """The state of a run before its folder is claimed.

    Attributes:
        devices: the devices that it trains on.
        folder: the run folder.
        resumed: the run and checkpoint that it continues; None for a new run.
        info: its name, tags and params.
        started: when it began, in seconds on the monotonic clock. The time between an interruption and the resume does
            not count.
    """

    devices: DeviceSet
    folder: Path
    resumed: Resumption | None
    info: RunInfo
    started: float


def begin(config: Config, context: RunContext) -> Beginning:
    """Find the devices, and the run to resume if there is one.

    Raises:
        MachineError: the devices do not exist or do not support the precision.
        ConfigError: the run to resume does not exist or does not match the settings.
        StorageError: the run to resume cannot be read.
    """
    devices = find_devices(config.devices)
    check_precision(config.train.precision, devices.accelerator)
    resumed = resume.find(config, context.folder, anywhere=context.is_single, warn=warn)
    folder = context.folder
    if resumed and resumed.in_place:
        if not resumed.finished:
            folder = _continued_folder(resumed.run_dir, folder)
    else:
        check_scaling(config, devices.count)
    info = _run_info(config, devices, folder, context, resumed)
    started = time.monotonic() - context.age - (resumed.elapsed if resumed else 0.0)
    return Beginning(devices, folder, resumed, info, started)


@contextmanager
def claimed(beginning: Beginning, config: Config) -> Iterator[RunInfo]:
    """Lock the run folder while the context is open. For a new run, write its tags and resolved configuration there.

    A stop file that an earlier start has left there is removed: it would end this run at its first step.

    Raises:
        ConfigError: the folder has another run, or another process uses it.
    """
    new, resumed = beginning.info, beginning.resumed
    with lock_run_folder(new.run_dir):
        if resumed and resumed.in_place:
            _remove_stop_file(new.run_dir)
            yield RunInfo.load(new.run_dir)
            return
        if (new.run_dir / RUN_FILE).exists():
            raise ConfigError(
                f"hydra.run.dir={new.run_dir}: the folder holds a run already, and two runs must not share one. "
                f"Set resume=auto to continue it, or another folder, or leave hydra.run.dir out for a new one"
            )
        _remove_stop_file(new.run_dir)
        write_atomically(new.run_dir / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(masked(asdict(config)))))
        new.save(config_changes.config_hash(config))  # last, so that a run that can be found has its configuration
        yield new


def _remove_stop_file(run_dir: Path) -> None:
    stop = run_dir / STOP_FILE
    if stop.is_file():
        with storage_errors(stop, f"Remove {stop}"):
            stop.unlink()
        warn(f"{stop}: removed. It was there before this start; create it while the run trains to end training")


def plan_job(
    config: Config, parts: Parts, context: RunContext, beginning: Beginning, console: Console
) -> tuple[Job, RunFacts]:
    """Read the images, make the plan, check the network, and print the plan.

    Returns:
        The job for the ranks, and the facts that the run's page shows.

    Raises:
        ConfigError: the settings do not fit the images or the network.
        DataError: the images cannot be read or are not those of the resumed run.
    """
    devices, resumed, folder = beginning.devices, beginning.resumed, beginning.folder
    data = hold_out(parts.dataset(), config.validation)
    if data.left_out:
        say(console, [f"left out of the images: {data.left_out}"])
    kept_batch = resumed.kept_batch if resumed else None
    plan = make_plan(config, devices.count, data.train_count, parts.schedule, kept_batch)
    for line in warnings(config, plan):
        warn(line)
    if resumed:
        resumed.check_images(data.content_hash)
        say(console, resumed.description(plan.world_size))
    model = checked_model(config, parts, len(data.classes))
    check_scales(plan, model, data.image_size)
    details = summary.describe_plan(plan, devices, data, model, config.early_stopping)
    summary.print_plan(console, details)
    if context.is_single:  # not for each job of a sweep
        summary.print_layers(console, model, data.image_size)
    facts = RunFacts(
        title=title(config),
        status="starting",
        epochs=plan.epochs,
        steps_per_epoch=plan.steps_per_epoch,
        lr_drops=_lr_drops(plan),
        details=details | {"folder": os.path.relpath(folder)},
    )
    job = new_job(config, parts, devices, plan, data, folder, beginning.started)
    if resumed:
        origin = (resumed.source, resumed.manifest) if resumed.manifest else None
        job = replace(job, elapsed=resumed.elapsed, resume_from=origin)
    return job, facts


def _continued_folder(folder: Path, hydras: Path) -> Path:
    """Return ``folder``, the resumed run's. Hydra's log is moved there and the new folder of Hydra is removed."""
    if folder.resolve() != hydras.resolve():
        root = logging.getLogger()
        for handler in [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]:
            log = Path(handler.baseFilename)
            moved = logging.FileHandler(folder / log.name)
            moved.setFormatter(handler.formatter)
            root.removeHandler(handler)
            root.addHandler(moved)
            handler.close()
            log.unlink()
        for empty in (hydras, hydras.parent):
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()
    return folder


def _run_info(
    config: Config, devices: DeviceSet, run_dir: Path, context: RunContext, resumed: Resumption | None
) -> RunInfo:
    tags = {"devices": str(devices.count), "accelerator": devices.accelerator}
    tags["oversubscribed"] = str(devices.oversubscribed).lower()
    tags |= machine.description(devices.accelerator, devices.count)
    overrides = masked([override for override in context.overrides if not override.startswith("resume=")])
    tags["overrides"] = printable(" ".join(overrides))
    if resumed and not resumed.in_place:
        tags["resumed_from"] = journal.run_id(resumed.run_dir) or resumed.run_dir.as_posix()
    if context.sweep_dir:
        tags["sweep"] = context.sweep_dir.as_posix()
    name = f"{title(config)}, {devices.count} x {devices.accelerator}"
    started_from = None
    if resumed and resumed.manifest and not resumed.in_place:
        started_from = resumed.source, resumed.manifest.step
    params = flattened(masked(asdict(config)))
    began = time.time() - context.age
    return RunInfo(name, run_dir, params, tags, began, ARTIFACTS, context.sweep_dir, started_from)


def _lr_drops(plan: Plan) -> list[tuple[int, float]]:
    """The drops of a piecewise constant schedule as (epoch before, new learning rate); empty for other schedules."""
    ranges = plan.learning_rate_ranges()
    if any(low != high for _, _, low, high in ranges):
        return []
    return [(first - 1, rate) for first, _, rate, _ in ranges[1:]]
