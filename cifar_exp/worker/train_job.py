"""One rank's life: device, process group, build, fit, close. It never enters Hydra and never imports mlflow."""

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from cifar_exp.data.batches import scaled_size
from cifar_exp.data.sources import Source, opened
from cifar_exp.data.validation_split import split_source
from cifar_exp.distributed.heartbeat import Control
from cifar_exp.distributed.process_group import World
from cifar_exp.errors import ConfigError
from cifar_exp.records import checkpoint
from cifar_exp.records.checkpoint import Checkpoint, Origin
from cifar_exp.records.checkpoint_saver import Saver
from cifar_exp.records.journal import Entry, JournalWriter, run_id
from cifar_exp.training.trainer import Trainer
from cifar_exp.worker.assembly import assembled
from cifar_exp.worker.final_metrics import _communication, _epochs, _tested, _times
from cifar_exp.worker.first_steps import _capture_steps, prepare_steps
from cifar_exp.worker.job import Job
from cifar_exp.worker.process import live

TRACE_FILE = "trace.json.gz"


def run_rank(job: Job, exchange: Path) -> None:
    """What each process runs that trains: see :func:`live`."""
    live(job, exchange, train)


def train(job: Job, world: World, control: Control) -> None:
    """Build everything on this rank's device, train, and write down how it went."""
    with opened(job.data, world.device, job.threads) as (train_images, test_images):
        _train(job, world, control, *split_source(train_images, job.data), test_images)


def _train(
    job: Job, world: World, control: Control, train_images: Source, kept_apart: Source | None, test_images: Source
) -> None:
    writer = JournalWriter(job.run_dir) if world.is_first else None

    def report(step: int, epoch: int, metrics: dict[str, float]) -> None:
        if writer:
            writer.write(Entry(step, epoch, time.monotonic() - job.started, metrics))

    saved = checkpoint.load(*job.resume_from) if job.resume_from else None
    parts = assembled(job, world, control, report, train_images, test_images, saved)
    model, trainer, batches, test = parts.model, parts.trainer, parts.batches, parts.test
    normalization = batches.normalization
    if saved:
        _go_on(trainer, saved, job)
    validation = test if kept_apart is None else replace(test, source=kept_apart)
    with ExitStack() as closing:
        if job.train.profile and world.is_first:
            trainer.after_step = closing.enter_context(profiler(job.run_dir / TRACE_FILE)).step
        saver = closing.enter_context(Saver(job.run_dir, job.checkpoint.keep)) if world.is_first else None

        def save(must: bool) -> None:
            progress = trainer.early_stopping
            # The test set chooses nothing: where no images are kept apart there is no best checkpoint.
            best_step, best = (progress.best_step, progress.best) if kept_apart is not None else (None, None)
            if not (must or trainer.epoch % job.checkpoint.every == 0 or best_step == trainer.step):
                if saver:
                    saver.wait()  # a save that failed is told an epoch later, not when the next one is due
                return
            training = trainer.state_dict()  # for which all ranks are needed
            if saver:
                shift, scale = normalization.shift, normalization.scale
                classes, size = job.data.classes, scaled_size(job.data.image_size, validation.scale)
                used = trainer.evaluated.state_dict()
                state = Checkpoint(used, model.state_dict(), training, classes, shift, scale, size)
                origin = Origin(
                    epoch=trainer.epoch,
                    step=trainer.step,
                    global_batch_size=job.plan.global_batch_size,
                    world_size=world.size,
                    data_hash=job.data.content_hash,
                    config_hash=job.config_hash,
                    seconds=time.monotonic() - job.started,
                    best_step=best_step,
                    best_value=best,
                    run_id=run_id(job.run_dir),
                )
                assert writer
                writer.sync()  # a checkpoint must not outlive the journal of its steps
                saver.save(state, origin)

        seconds = trainer.stopwatch.seconds
        seconds["startup"] = seconds.get("startup", 0.0) + time.monotonic() - job.started - job.elapsed
        prepare_steps(trainer, batches, job.train.compile, world)
        if world.device.type == "cuda" and job.train.compile != "never":
            _capture_steps(trainer, batches, job.train.compile, world)
        validated = trainer.fit(batches, validation, job.plan.epochs, save)
        with trainer.stopwatch.span("checkpoint"):
            if saver:
                saver.wait()
    if validated is None:
        return
    with trainer.stopwatch.span("evaluation"):
        tested = _tested(trainer, test, validated, job, control)
    counts = {"devices": world.size, "global_batch_size": job.plan.global_batch_size}
    times = _times(trainer, job.plan.global_batch_size) | _communication(trainer, model, world)
    report(trainer.step, trainer.epoch, tested | counts | _epochs(trainer, job) | times)


def profiler(path: Path) -> torch.profiler.profile:
    """A profiler that leaves the first steps out and writes a trace of six; ``step`` is to be called after each."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=2, warmup=2, active=6, repeat=1),
        on_trace_ready=lambda profile: profile.export_chrome_trace(str(path)),
        record_shapes=True,
    )


def _go_on(trainer: Trainer, saved: Checkpoint, job: Job) -> None:
    assert job.resume_from
    folder, manifest = job.resume_from
    try:
        trainer.load_state_dict(saved.training, same_run=folder == job.run_dir)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"optimizer: the checkpoint's state is another one's: {error}") from error
    trainer.share_epoch_anew(job.plan.steps_per_epoch, manifest.global_batch_size / job.plan.global_batch_size)
