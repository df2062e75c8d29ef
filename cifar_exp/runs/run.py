"""One run in the parent process: devices, images, plan, ranks, record."""

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import psutil
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from rich.console import Console

from cifar_exp.config.defaults import flattened
from cifar_exp.config.schema import Config
from cifar_exp.data.validation_split import hold_out
from cifar_exp.display.curves import RunFacts
from cifar_exp.display.display import Display
from cifar_exp.errors import ConfigError, Stopped
from cifar_exp.launch.devices import DeviceSet, find_devices
from cifar_exp.records import checkpoint, journal, model_export
from cifar_exp.records.run_folder import CONFIG_FILE, RUN_FILE, RunInfo, claim, is_undelivered
from cifar_exp.runs import config_changes, resume, summary
from cifar_exp.runs.components import Parts
from cifar_exp.runs.job_setup import new_job, title
from cifar_exp.runs.model_check import check_scales, checked_model
from cifar_exp.runs.resume import Resumption
from cifar_exp.system import load_watch, machine
from cifar_exp.system.process import uv_prefix
from cifar_exp.system.redaction import masked
from cifar_exp.tracking.recorder import Recording
from cifar_exp.training.plan import Plan, check_scaling, doubts, make_plan
from cifar_exp.worker.train_job import TRACE_FILE, run_rank

ARTIFACTS = (CONFIG_FILE, "progress.html", "training.png", journal.JOURNAL_FILE, TRACE_FILE, model_export.MODEL_FILE)


def run(config: Config, parts: Parts) -> float:
    """Train as configured; the test accuracy, 0 to 1.

    Raises:
        CifarExpError: whatever keeps the run from its end, with the exit code that scripts rely on.
    """
    single = HydraConfig.get().mode == RunMode.RUN
    age = _process_age() if single else 0.0
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    console = Console(quiet=config.progress == "quiet", soft_wrap=True)
    devices = find_devices(config.devices)
    resumed = resume.find(config, run_dir, anywhere=single, warn=_warn)
    if resumed and resumed.finished:
        accuracy = journal.last_values(resumed.run_dir)["test/accuracy"]
        console.print(f"{resumed.run_dir}: finished before, test accuracy {accuracy:.4f}", highlight=False)
        if is_undelivered(resumed.run_dir):
            console.print(parts.tracker.deliver(resumed.run_dir), highlight=False)
        return accuracy
    if resumed and resumed.in_place:
        run_dir = _continued_folder(resumed.run_dir, run_dir)
    else:
        check_scaling(config, devices.count)
    new = _run_info(config, devices, run_dir, time.time() - age, resumed)
    started = time.monotonic() - age - (resumed.elapsed if resumed else 0.0)
    with (
        _claimed(new, config, resumed) as info,
        Recording(run_dir, started, parts.tracker.sink(info), parts.tracker.store()) as recording,
    ):
        data = hold_out(parts.dataset(), config.validation)
        plan = make_plan(
            config, devices.count, data.train_count, parts.schedule, resumed.kept_batch if resumed else None
        )
        for line in doubts(config, plan):
            _warn(line)
        if resumed:
            resumed.check_images(data.content_hash)
            _tell(console, resumed.description(plan.world_size))
        model = checked_model(config, parts, len(data.classes))
        check_scales(plan, model, data.image_size)
        details = summary.describe_plan(plan, devices, data, model, config.early_stopping)
        summary.print_plan(console, details)
        if single:  # a sweep would print it for each of its jobs
            summary.print_layers(console, model, data.image_size)
        facts = RunFacts(
            title=title(config),
            status="starting",
            epochs=plan.epochs,
            steps_per_epoch=plan.steps_per_epoch,
            lr_drops=_lr_drops(plan),
            details=details | {"folder": os.path.relpath(run_dir)},
        )
        recording.start(Display(run_dir, facts, config.progress, console, started))
        job = new_job(config, parts, devices, plan, data, run_dir, started)
        if resumed:
            origin = (resumed.source, resumed.manifest) if resumed.manifest else None
            job = replace(job, elapsed=resumed.elapsed, resume_from=origin)
        with load_watch.Watch(devices.accelerator, devices.count) as watch:
            try:
                ended = parts.launcher.launch(run_rank, job)
            except Stopped:
                _tell_what_was_saved(console, run_dir, run_dir if single else Path(HydraConfig.get().sweep.dir))
                raise
        recording.closing |= watch.metrics()
        if ended:
            _tell(console, [f"training ended early: {ended.reason}"])
        model_export.publish(run_dir, config.model, _warn)
    metrics = journal.last_values(run_dir)
    summary.print_outcome(console, metrics, simulated=devices.accelerator == "cpu" and devices.count > 1)
    _tell(console, summary.selection(metrics, config.train.epochs, config.early_stopping))
    if single:
        _print_next_steps(console, run_dir, parts.tracker.hint())
    return metrics["test/accuracy"]


def _tell(console: Console, lines: Sequence[str]) -> None:
    """Lines that the run's log keeps, too."""
    for line in lines:
        console.print(line, highlight=False)
        logging.getLogger(__name__).info(line)


def _tell_what_was_saved(console: Console, run_dir: Path, resumable: Path) -> None:
    """``resumable``: the folder to resume; a sweep's where the run is one of its jobs."""
    if manifest := checkpoint.sound(run_dir, _warn):
        how = f"the same command with resume={os.path.relpath(resumable)} goes on"
        console.print(f"saved after step {manifest.step}; {how}", highlight=False)


def _process_age() -> float:
    """Seconds since the command began. psutil's own figure counts from a boot time in whole seconds."""
    process = psutil.Process()
    if not hasattr(time, "CLOCK_BOOTTIME"):  # not Linux
        return time.time() - process.create_time()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - (process.create_time() - psutil.boot_time())


@contextmanager
def _claimed(new: RunInfo, config: Config, resumed: Resumption | None) -> Iterator[RunInfo]:
    """Hold the run's folder; a new run's gets its name, tags and resolved configuration. What goes on has its own."""
    with claim(new.run_dir):
        if resumed and resumed.in_place:
            yield RunInfo.load(new.run_dir)
            return
        if (new.run_dir / RUN_FILE).exists():
            raise ConfigError(
                f"hydra.run.dir={new.run_dir}: the folder holds a run already, and two runs must not share one. "
                f"Type resume=auto to go on with it, another folder, or leave hydra.run.dir out for a new one"
            )
        OmegaConf.save(OmegaConf.create(masked(asdict(config))), new.run_dir / CONFIG_FILE)
        new.save(config_changes.config_hash(config))  # last: whoever finds a run finds its configuration too
        yield new


def _continued_folder(folder: Path, hydras: Path) -> Path:
    """The folder of the run that goes on; the one that Hydra made for this command is given up, its log moved."""
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


def _warn(line: str) -> None:
    print(f"cifar-exp: {line}", file=sys.stderr, flush=True)
    logging.getLogger(__name__).warning(line)


def _run_info(config: Config, devices: DeviceSet, run_dir: Path, began: float, resumed: Resumption | None) -> RunInfo:
    tags = {"devices": str(devices.count), "accelerator": devices.accelerator}
    tags["oversubscribed"] = str(devices.oversubscribed).lower()
    tags |= machine.description(devices.accelerator, devices.count)
    hydra = HydraConfig.get()
    overrides = masked([override for override in hydra.overrides.task if not override.startswith("resume=")])
    tags["overrides"] = " ".join(overrides)
    if resumed and not resumed.in_place:
        tags["resumed_from"] = journal.run_id(resumed.run_dir) or resumed.run_dir.as_posix()
    sweep_dir = Path(hydra.sweep.dir) if hydra.mode == RunMode.MULTIRUN else None
    if sweep_dir:
        tags["sweep"] = sweep_dir.as_posix()
    name = f"{title(config)}, {devices.count} x {devices.accelerator}"
    origin = None
    if resumed and resumed.manifest and not resumed.in_place:
        origin = resumed.source, resumed.manifest.step
    return RunInfo(name, run_dir, flattened(masked(asdict(config))), tags, began, ARTIFACTS, sweep_dir, origin)


def _lr_drops(plan: Plan) -> list[tuple[int, float]]:
    """Epochs after which a piecewise rate changes, with the new rate; none where it moves all the time."""
    ranges = plan.learning_rate_ranges()
    if any(low != high for _, _, low, high in ranges):
        return []
    return [(first - 1, rate) for first, _, rate, _ in ranges[1:]]


def _print_next_steps(console: Console, run_dir: Path, hint: str) -> None:
    console.print(f"\nrun folder: {os.path.relpath(run_dir)}", highlight=False)
    console.print(f"page:       {os.path.relpath(run_dir / 'progress.html')}", highlight=False)
    console.print(f"figure:     {os.path.relpath(run_dir / 'training.png')}", highlight=False)
    uv = uv_prefix()
    if hint:
        console.print(f"compare:    {hint}", highlight=False)
    console.print(f"try next:   {uv}cifar-exp-predict run=latest <images>", highlight=False)
    console.print(f"            {uv}cifar-exp -m experiment=speedup devices.count=1,2", highlight=False)
