"""One run in the parent process: find devices and checkpoint, lock the folder, plan, run the ranks, print results."""

import os
from pathlib import Path

from rich.console import Console

from cifar_exp.config.arguments import argument
from cifar_exp.config.schema import Config
from cifar_exp.display.display import Display
from cifar_exp.distributed.stop_requests import Request
from cifar_exp.errors import Stopped
from cifar_exp.launch.elastic import ElasticLauncher
from cifar_exp.records import checkpoint, journal, model_export
from cifar_exp.records.refused_start import REFUSING_ERRORS
from cifar_exp.records.run_folder import is_undelivered
from cifar_exp.runs import result_summary
from cifar_exp.runs.announce import say, warn
from cifar_exp.runs.components import Components
from cifar_exp.runs.context import Result, RunContext
from cifar_exp.runs.locked_folder import locked_run_folder, remove_new_run
from cifar_exp.runs.plan_job import plan_job
from cifar_exp.runs.prepare import PreparedRun, prepare
from cifar_exp.system import load_watch
from cifar_exp.system.process import uv_prefix
from cifar_exp.system.terminal import Terminal
from cifar_exp.tracking.recorder import Recording
from cifar_exp.tracking.tracker import tracking_lines
from cifar_exp.worker.job import Job
from cifar_exp.worker.train_job import run_rank


def run(config: Config, components: Components, context: RunContext) -> Result:
    """Train one run.

    Args:
        config: the typed configuration.
        components: its components.
        context: the run folder, overrides and sweep.

    Returns:
        The run folder and the last value of each metric.

    Raises:
        CifarExpError: the run failed; ``exit_code`` says why.
        Stopped: a signal stopped the run.
    """
    console = Terminal(quiet=config.progress == "quiet", soft_wrap=True)
    prepared = prepare(config, context)
    if context.is_single:
        say(console, tracking_lines(config.tracking, components.tracker))
    if prepared.resumed and prepared.resumed.finished:
        return _finished_before(prepared.resumed.run_dir, components, console)
    with locked_run_folder(prepared, config) as info:
        sink, store = components.tracker.sink(info), components.tracker.store()
        recording = Recording(prepared.folder, prepared.started, sink, store)
        try:
            job, facts = plan_job(config, components, context, prepared, console)
            if isinstance(components.launcher, ElasticLauncher):
                components.launcher.admit_hosts(job)
        except REFUSING_ERRORS:  # a run that was not started is not recorded
            remove_new_run(prepared)
            raise
        except BaseException:
            with recording:
                raise
        with recording:
            display = Display(prepared.folder, facts, config.progress, console, prepared.started)
            recording.start(display)
            ended, load = _execute(components, job, context, prepared, console)
            display.ended_early = ended.reason if ended else ""
            recording.final_metrics |= load
            model_export.publish(prepared.folder, config.model, warn)
    return _conclude(config, components, context, prepared, console)


def _finished_before(folder: Path, components: Components, console: Console) -> Result:
    """Report a run that is already finished, and deliver it to MLflow if that failed before."""
    result = Result(folder, journal.last_values(folder))
    console.print(f"{folder}: finished before, test accuracy {result.test_accuracy:.4f}", highlight=False)
    if is_undelivered(folder):
        console.print(components.tracker.deliver(folder), highlight=False)
    return result


def _execute(
    components: Components, job: Job, context: RunContext, prepared: PreparedRun, console: Console
) -> tuple[Request | None, dict[str, float]]:
    """Run the ranks until they end.

    Returns:
        Why training ended early, if it did, and metrics of the machine's load.
    """
    devices = prepared.devices
    with load_watch.LoadWatch(devices.accelerator, devices.world_size // devices.hosts) as watch:
        try:
            ended = components.launcher.launch(run_rank, job)
        except Stopped:
            _print_saved_step(console, prepared.folder, context.sweep_dir or prepared.folder)
            raise
    if ended:
        say(console, [f"training ended early: {ended.reason}"])
    return ended, watch.metrics()


def _conclude(
    config: Config, components: Components, context: RunContext, prepared: PreparedRun, console: Console
) -> Result:
    """Print the results and the next commands."""
    devices = prepared.devices
    result = Result(prepared.folder, journal.last_values(prepared.folder))
    simulated = devices.accelerator == "cpu" and devices.world_size > devices.hosts
    result_summary.print_outcome(console, dict(result.metrics), simulated=simulated)
    say(console, result_summary.selection(dict(result.metrics), config.train.epochs, config.early_stopping))
    if context.is_single:
        _print_next_steps(console, prepared.folder, components.tracker.hint())
    return result


def _print_saved_step(console: Console, run_dir: Path, resumable: Path) -> None:
    """Print the last saved step and how to resume.

    Args:
        console: the terminal.
        run_dir: the run folder.
        resumable: the value for ``resume``: the run folder, or the sweep's folder for a job of a sweep.
    """
    if manifest := checkpoint.newest_intact_manifest(run_dir, warn):
        how = f"the same command with {argument('resume', os.path.relpath(resumable))} continues"
        console.print(f"saved after step {manifest.step}; {how}", highlight=False)


def _print_next_steps(console: Console, run_dir: Path, hint: str) -> None:
    uv = uv_prefix()
    lines = [
        f"\nrun folder: {os.path.relpath(run_dir)}",
        f"page:       {os.path.relpath(run_dir / 'progress.html')}",
        f"figure:     {os.path.relpath(run_dir / 'training.png')}",
        *([f"compare:    {hint}"] if hint else []),
        f"try next:   {uv}cifar-exp predict latest <images>",
        f"            {uv}cifar-exp -m experiment=speedup devices.count=1,2",
    ]
    for line in lines:
        console.print(line, highlight=False)
