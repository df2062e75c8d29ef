"""Read the images of a run, plan it, check its network, print the plan, and build the job for its ranks."""

import os
from dataclasses import replace

from rich.console import Console

from cifar_exp.config.schema import Config
from cifar_exp.data.validation_split import hold_out
from cifar_exp.display.curves import PageFacts
from cifar_exp.runs import plan_summary
from cifar_exp.runs.announce import say, warn
from cifar_exp.runs.components import Components
from cifar_exp.runs.context import RunContext
from cifar_exp.runs.job_setup import new_job
from cifar_exp.runs.model_check import Tried, try_out
from cifar_exp.runs.start import RunStart
from cifar_exp.runs.user_code import refusing
from cifar_exp.training.plan import Plan, make_plan, warnings
from cifar_exp.worker.job import Job


def plan_job(
    config: Config, components: Components, context: RunContext, start: RunStart, console: Console
) -> tuple[Job, PageFacts]:
    """Read the images, make the plan, check the network, and print the plan.

    Returns:
        The job for the ranks, and the facts that the run's page shows.

    Raises:
        ConfigError: the settings do not fit the images or the network.
        DataError: the images cannot be read or are not those of the resumed run.
    """
    devices, resumed = start.devices, start.resumed
    data = hold_out(components.dataset(), config.validation)
    if data.left_out:
        say(console, [f"left out of the images: {data.left_out}"])
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
        title=start.title,
        status="starting",
        epochs=plan.epochs,
        steps_per_epoch=plan.steps_per_epoch,
        lr_drops=_lr_drops(plan),
        details=details | {"folder": os.path.relpath(start.folder)},
    )
    job = new_job(config, start.config_hash, components, devices, plan, data, start.folder, start.started)
    job = replace(job, has_unused=bool(tried.unused))
    if resumed:
        origin = (resumed.source, resumed.manifest) if resumed.manifest else None
        job = replace(job, elapsed=resumed.elapsed, resume_from=origin)
    return job, facts


def _without_gradient(tried: Tried) -> str:
    names = ", ".join(tried.unused[:3]) + (", ..." if len(tried.unused) > 3 else "")
    return f"model: {len(tried.unused)} parameters get no gradient in a trial step and stay as they are then: {names}"


def _lr_drops(plan: Plan) -> list[tuple[int, float]]:
    """The drops of a piecewise constant schedule as (epoch before, new learning rate); empty for other schedules."""
    ranges = plan.learning_rate_ranges()
    if any(len(rates) > 1 for *_, rates in ranges):
        return []
    return [(first - 1, rates[0]) for first, _, rates in ranges[1:]]
