"""Read the images of a run, plan it, check its network, print the plan, and build the job for its ranks."""

import os
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from cifar_exp.config.schema import Config
from cifar_exp.data.dataset_files import DatasetFiles
from cifar_exp.data.validation_split import hold_out
from cifar_exp.display.curves import PageFacts
from cifar_exp.launch.devices import DeviceSet
from cifar_exp.runs import plan_summary
from cifar_exp.runs.announce import say, warn
from cifar_exp.runs.components import Components
from cifar_exp.runs.config_changes import result_settings
from cifar_exp.runs.context import RunContext
from cifar_exp.runs.model_check import Tried, try_out
from cifar_exp.runs.prepare import PreparedRun
from cifar_exp.runs.user_code import refusing
from cifar_exp.training.plan import Plan, make_plan, warnings
from cifar_exp.worker.job import Job


def plan_job(
    config: Config, components: Components, context: RunContext, prepared: PreparedRun, console: Console
) -> tuple[Job, PageFacts]:
    """Read the images, make the plan, check the network, and print the plan.

    Returns:
        The job for the ranks, and the facts that the run's page shows.

    Raises:
        ConfigError: the settings do not fit the images or the network.
        DataError: the images cannot be read or are not those of the resumed run.
    """
    devices, resumed = prepared.devices, prepared.resumed
    data = hold_out(components.dataset(), config.validation)
    if data.skipped:
        say(console, [f"skipped files: {data.skipped}"])
    kept_batch = resumed.kept_batch if resumed else None
    with refusing("schedule: it fails", config.trusted_modules, "Correct it, or set schedule=cosine"):
        plan = make_plan(config, devices.world_size, data.train_count, components.schedule, kept_batch)
    for line in warnings(config, plan):
        warn(line)
    if resumed:
        resumed.check_images(data.content_hash)
        say(console, resumed.description(plan.world_size))
    tried = try_out(config, components, plan, data, devices.accelerator)
    model = tried.model
    if tried.unused:
        warn(_without_gradient(tried))
    details = plan_summary.describe_plan(plan, devices, data, model, config.early_stopping)
    plan_summary.print_plan(console, details)
    if context.is_single:  # not for each job of a sweep
        plan_summary.print_layers(console, model, data.image_size)
    facts = PageFacts(
        title=prepared.title,
        status="starting",
        epochs=plan.epochs,
        steps_per_epoch=plan.steps_per_epoch,
        lr_drops=_lr_drops(plan),
        details=details | {"folder": os.path.relpath(prepared.folder)},
    )
    job = new_job(config, prepared.config_hash, components, devices, plan, data, prepared.folder, prepared.started)
    job = replace(job, has_unused=bool(tried.unused), overrides=context.overrides)
    if resumed:
        origin = (resumed.source, resumed.manifest) if resumed.manifest else None
        job = replace(job, elapsed=resumed.elapsed, resume_from=origin)
    return job, facts


def new_job(
    config: Config,
    config_hash: str,
    components: Components,
    devices: DeviceSet,
    plan: Plan,
    data: DatasetFiles,
    run_dir: Path,
    started: float,
) -> Job:
    """Build the job of a new run.

    Args:
        config: the run's configuration.
        config_hash: hash of its settings that affect the result.
        components: its components.
        devices: the devices that it trains on.
        plan: steps, batch sizes and learning rates.
        data: the dataset, split into training, validation and test images.
        run_dir: the run folder.
        started: start of the run on the monotonic clock.
    """
    return Job(
        run_dir=run_dir,
        started=started,
        elapsed=0.0,
        config_hash=config_hash,
        settings=result_settings(config),
        resume_from=None,
        seed=config.seed,
        plan=plan,
        train=config.train,
        checkpoint=config.checkpoint,
        early_stopping=config.early_stopping,
        data=data,
        augmentation=components.augmentation,
        make_model=components.make_model,
        make_optimizer=components.make_optimizer,
        accelerator=devices.accelerator,
        threads=devices.threads,
        timeout=components.launcher.timeout,
    )


def _without_gradient(tried: Tried) -> str:
    names = ", ".join(tried.unused[:3]) + (", ..." if len(tried.unused) > 3 else "")
    return f"model: {len(tried.unused)} parameters get no gradient in a trial step, so they are not trained: {names}"


def _lr_drops(plan: Plan) -> list[tuple[int, float]]:
    """The drops of a piecewise constant schedule as (epoch before, new learning rate); empty for other schedules."""
    ranges = plan.learning_rate_ranges()
    if any(len(rates) > 1 for *_, rates in ranges):
        return []
    return [(first - 1, rates[0]) for first, _, rates in ranges[1:]]
