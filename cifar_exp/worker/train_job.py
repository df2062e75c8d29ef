"""One rank's run: build, resume, train, test. Rank 0 writes the journal. No Hydra, no MLflow."""

import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from cifar_exp.data.sources import Source, open_sources
from cifar_exp.data.validation_split import split_source
from cifar_exp.distributed.process_group import World
from cifar_exp.distributed.rank_control import RankControl
from cifar_exp.errors import ConfigError
from cifar_exp.records import checkpoint
from cifar_exp.records.checkpoint import Checkpoint
from cifar_exp.records.checkpoint_saver import CheckpointSaver
from cifar_exp.records.journal import Entry, JournalWriter
from cifar_exp.training.metrics import MetricValues
from cifar_exp.training.trainer import Trainer
from cifar_exp.worker.checkpoint_policy import CheckpointPolicy, RankZeroFiles
from cifar_exp.worker.final_metrics import report_end
from cifar_exp.worker.first_step import prepare_first_step
from cifar_exp.worker.job import Job
from cifar_exp.worker.rank_process import run_in_rank_process
from cifar_exp.worker.training_setup import TrainingSetup, build_training_setup

TRACE_FILE = "trace.json.gz"


def run_rank(job: Job, ipc_dir: Path) -> None:
    """The entry point of each training process; see :func:`run_in_rank_process`."""
    run_in_rank_process(job, ipc_dir, _train)


def _train(job: Job, world: World, control: RankControl) -> None:
    """Train on this rank's device, and write journal and checkpoints on rank 0."""
    with (
        open_sources(job.data, world.device, job.threads) as (images, test_images),
        JournalWriter(job.run_dir) if world.is_first else nullcontext() as journal,
    ):
        train_images, held_out = split_source(images, job.data)

        def report(step: int, epoch: int, metrics: dict[str, float]) -> None:
            if journal:
                journal.write(Entry(step, epoch, time.monotonic() - job.started, metrics))

        saved = checkpoint.load(*job.resume_from) if job.resume_from else None
        setup = build_training_setup(job, world, control, report, train_images, test_images, saved)
        trainer = setup.trainer
        if saved:
            _resume(trainer, saved, job)
        validated = _fit(job, world, setup, held_out, journal)
        if validated is None:
            return
        report_end(job, world, setup, control, report, validated)


def _fit(
    job: Job, world: World, setup: TrainingSetup, held_out: Source | None, journal: JournalWriter | None
) -> MetricValues | None:
    """Train with checkpoints and, with ``train.profile``, a profiler trace.

    Returns:
        The last validation, or None if interrupted.
    """
    trainer, batches = setup.trainer, setup.batches
    validation = setup.test if held_out is None else replace(setup.test, source=held_out)
    with ExitStack() as closing:
        if job.train.profile and world.is_first:
            trainer.after_step = closing.enter_context(profiler(job.run_dir / TRACE_FILE)).step
        files = None
        if journal:
            files = RankZeroFiles(journal, closing.enter_context(CheckpointSaver(job.run_dir, job.checkpoint.keep)))
        policy = CheckpointPolicy(job, world, setup, validation, held_out is not None, files)
        seconds = trainer.stopwatch.seconds
        seconds["startup"] = seconds.get("startup", 0.0) + time.monotonic() - job.started - job.elapsed
        prepare_first_step(trainer, batches, job.train.compile, world)
        validated = trainer.fit(batches, validation, job.plan.epochs, policy.save)
        with trainer.stopwatch.span("checkpoint"):
            policy.wait()
    return validated


def profiler(path: Path) -> torch.profiler.profile:
    """A profiler that skips the first steps and writes a trace of six. Call its ``step`` after each training step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=2, warmup=2, active=6, repeat=1),
        on_trace_ready=lambda profile: profile.export_chrome_trace(str(path)),
        record_shapes=True,
    )


def _resume(trainer: Trainer, saved: Checkpoint, job: Job) -> None:
    """Resume from the checkpoint, with the plan's global batch."""
    assert job.resume_from
    folder, manifest = job.resume_from
    try:
        trainer.load_state_dict(saved.training, same_run=folder == job.run_dir)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"optimizer: the checkpoint has the state of another optimizer: {error}. Set optimizer=<that optimizer>, "
            f"or resume=never"
        ) from error
    trainer.rescale_progress(job.plan.steps_per_epoch, manifest.global_batch_size / job.plan.global_batch_size)
