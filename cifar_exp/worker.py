"""One rank's life: device, process group, build, fit, close. It never enters Hydra and never imports mlflow."""

import gc
import inspect
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cifar_exp import checkpoint, distributed
from cifar_exp.array_cache import DatasetFiles
from cifar_exp.augment import Augmentation
from cifar_exp.batch_norm import synchronized
from cifar_exp.checkpoint import Checkpoint, Manifest, Origin, Saver
from cifar_exp.control import Control
from cifar_exp.data import EvaluationBatches, Normalization, TrainBatches, scaled
from cifar_exp.distributed import World
from cifar_exp.early_stopping import EarlyStopping
from cifar_exp.errors import (
    CifarExpError,
    ConfigError,
    DataError,
    DivergenceError,
    MachineError,
    StorageError,
)
from cifar_exp.graph import cuda_graph
from cifar_exp.journal import Entry, JournalWriter, run_id
from cifar_exp.metrics import Averages
from cifar_exp.models import InitializedFromImages, ModelFactory, initialize_from_images, seeded
from cifar_exp.nursery import end_with_parent
from cifar_exp.optim import OptimizerFactory
from cifar_exp.plan import Plan
from cifar_exp.process import keep_freed_memory
from cifar_exp.residency import Source, fetch, opened
from cifar_exp.schema import Checkpoint as CheckpointSettings
from cifar_exp.schema import EarlyStopping as EarlyStoppingSettings
from cifar_exp.schema import Train
from cifar_exp.train import Mirrored, Report, Trainer, evaluate
from cifar_exp.validation import divided

DEAD_PEER_PATIENCE = 2.0  # seconds
TRACE_FILE = "trace.json.gz"
COMPILER = ("torch._dynamo", "torch._inductor")  # by name: importing them takes seconds


@dataclass(frozen=True)
class Job:
    """All that a rank is told: one plain, picklable object.

    Attributes:
        run_dir: the run's folder, where rank 0 writes.
        started: when the run began, on the monotonic clock, which nobody sets; time between its sessions left out.
        elapsed: seconds the run took in earlier sessions; 0 in a new run.
        config_hash: of the settings that bear on the result.
        resume_from: folder of the run and its checkpoint to go on from; None starts from initial values.
        seed: of initial values, order and augmentation.
        plan: batches, steps and learning rates.
        train: the training loop's settings.
        checkpoint: how often the state is saved, and how much of it stays.
        early_stopping: when training ends before its last epoch, and which epoch is the best.
        data: the images on disk.
        augmentation: of training images.
        make_model: called with ``num_classes``.
        make_optimizer: called with the parameters and ``lr``.
        accelerator: ``cpu`` or ``gpu``.
        threads: CPU threads of this rank.
        timeout: seconds without a sign of life after which the launcher takes a rank for hung.
    """

    run_dir: Path
    started: float
    elapsed: float
    config_hash: str
    resume_from: tuple[Path, Manifest] | None
    seed: int
    plan: Plan
    train: Train
    checkpoint: CheckpointSettings
    early_stopping: EarlyStoppingSettings
    data: DatasetFiles
    augmentation: Augmentation
    make_model: ModelFactory
    make_optimizer: OptimizerFactory
    accelerator: str
    threads: int
    timeout: float


@dataclass(frozen=True)
class RankFailure:
    """Why a rank failed, as it told the launcher before it ended.

    Attributes:
        rank: which one.
        time: when, seconds since the epoch.
        exit_code: the error's own where the user can mend it, else None.
        message: the error in one line.
        traceback: the whole traceback.
    """

    rank: int
    time: float
    exit_code: int | None
    message: str
    traceback: str

    def save(self, exchange: Path, attempt: int) -> None:
        """Leave word. The launcher may look at any moment, and sees the whole of it or nothing."""
        path = exchange / f"failure-{attempt}-{self.rank}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(vars(self)))
        temporary.replace(path)

    @classmethod
    def of_attempt(cls, exchange: Path, attempt: int) -> "list[RankFailure]":
        """Those of the ranks' ``attempt``-th start, counted from 0, that had the time to tell."""
        return [cls(**json.loads(path.read_text())) for path in exchange.glob(f"failure-{attempt}-*.json")]

    def raise_if_lasting(self) -> None:
        """Raise again what would come again: an error that is the user's to mend."""
        for kind in (ConfigError, DataError, MachineError, DivergenceError, StorageError):
            if self.exit_code == kind.exit_code:
                raise kind(self.message.partition(": ")[2])


def run_rank(job: Job, exchange: Path) -> None:
    """What each process runs that trains: see :func:`live`."""
    live(job, exchange, train)


def live(job: Job, exchange: Path, work: Callable[[Job, World, Control], None]) -> None:
    """The whole life of a started process.

    Args:
        job: what to do.
        exchange: a private folder in which ranks find each other, leave word of a failure, and are told to end.
        work: done once this rank has its device and knows the others.
    """
    end_with_parent()
    gc.freeze()  # what the nursery has imported stays, and is no longer looked through
    gc.enable()
    # Ctrl-C reaches every process of the terminal; it is the launcher's to answer, which tells the ranks by a file.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rank, attempt = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    try:
        control = Control(exchange, job.run_dir, rank, _steps_between_waits(job), _seconds_left(job))
        if attempt:
            job = _restarted(job, exchange, rank, attempt)
        _prepare_process(job)
        # Longer than the launcher's patience, which knows better who is to blame.
        with distributed.joined_world(job.accelerator, exchange, 2 * job.timeout + 60) as world:
            work(job, world, control)
        control.done()
    except Exception as error:
        if not exchange.exists():  # the launcher was stopped before it knew of this rank, and nobody is to hear of it
            os._exit(1)
        code = error.exit_code if isinstance(error, CifarExpError) else None
        failure = RankFailure(rank, time.time(), code, f"{type(error).__name__}: {error}", traceback.format_exc())
        failure.save(exchange, attempt)
        if code is None and int(os.environ["WORLD_SIZE"]) > 1:
            # It may only be the echo of a peer that was killed and could leave no word: let the launcher see that
            # one first. It ends this rank as soon as it does.
            time.sleep(DEAD_PEER_PATIENCE)
        sys.exit(1 if code is None else code)


def _steps_between_waits(job: Job) -> int:
    return 1 if job.accelerator == "cpu" else job.train.log_every


def _seconds_left(job: Job) -> float | None:
    limit = job.train.max_seconds
    return None if limit is None else limit - (time.monotonic() - job.started)


def _restarted(job: Job, exchange: Path, rank: int, attempt: int) -> Job:
    """The job after a rank died: it goes on from the newest checkpoint that is sound.

    Raises:
        CifarExpError: the one that ended the attempt before, where it would come again.
    """
    for failure in RankFailure.of_attempt(exchange, attempt - 1):
        failure.raise_if_lasting()

    def tell(line: str) -> None:
        if rank == 0:
            print(line, file=sys.stderr, flush=True)

    manifest = checkpoint.sound(job.run_dir, tell)
    after = f"step {manifest.step}" if manifest else "the beginning" if job.resume_from is None else "where it started"
    tell(f"cifar-exp: a rank died or hung; restart {attempt}: training goes on from {after}")
    # What was trained since is trained again: that time is start-up.
    return replace(job, resume_from=(job.run_dir, manifest), elapsed=manifest.seconds) if manifest else job


def train(job: Job, world: World, control: Control) -> None:
    """Build everything on this rank's device, train, and write down how it went."""
    with opened(job.data, world.device, job.threads) as (train_images, test_images):
        _train(job, world, control, *divided(train_images, job.data), test_images)


@dataclass(frozen=True)
class Assembly:
    """What one rank trains with.

    Attributes:
        model: the network itself, without what averages its gradients over ranks.
        trainer: of it.
        batches: this rank's of the training images.
        test: this rank's of the test images.
    """

    model: nn.Module
    trainer: Trainer
    batches: TrainBatches
    test: EvaluationBatches


def assembled(
    job: Job,
    world: World,
    control: Control,
    report: Report,
    train_images: Source,
    test_images: Source,
    saved: Checkpoint | None = None,
) -> Assembly:
    """All parts on this rank's device; the network with its initial values, or those ``saved``."""
    normalization = Normalization.of(job.train.normalization, job.data.mean, job.data.std)
    model = seeded(job.make_model, len(job.data.classes), job.seed)
    model = model.to(world.device).to(memory_format=torch.channels_last)
    if saved:
        _load(model, saved)
    elif any(isinstance(module, InitializedFromImages) for module in model.modules()):
        initialize_from_images(model, normalization(_sample(train_images)))
    if job.train.batch_norm == "synchronized" and world.size > 1:
        model = synchronized(model, world.device)
    precision = resolve_precision(job.train.precision, world.device)
    if job.train.compile == "always":
        model.compile()
    elif job.train.compile == "auto" and job.accelerator == "cpu":
        problem = fuse_layers(model, precision)
        if problem and world.is_first:
            print(f"train.compile=auto: the layers are PyTorch's own here, since {problem}", flush=True)
    parallel, communication = distributed.data_parallel(model, world)
    trainer = Trainer(
        model=parallel,
        optimizer=_optimizer(job, model),
        learning_rates=job.plan.learning_rates,
        precision=precision,
        label_smoothing=job.train.label_smoothing,
        log_every=job.train.log_every,
        report=report,
        communication=communication,
        control=control,
        batch_norm=job.train.batch_norm,
        averaging=job.train.weight_averaging,
        early_stopping=EarlyStopping(job.early_stopping),
    )
    share = (world.rank, world.size)
    batches = TrainBatches(
        train_images,
        job.augmentation,
        normalization,
        job.seed,
        *share,
        job.plan.per_device_batch_size,
        job.plan.image_scales,
        job.plan.accumulate,
    )
    test = EvaluationBatches(test_images, normalization, *share, scale=job.plan.image_scales[-1])
    return Assembly(model, trainer, batches, test)


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
                classes, size = job.data.classes, scaled(job.data.image_size, validation.scale)
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


def _communication(trainer: Trainer, model: nn.Module, world: World) -> dict[str, float]:
    """Where the time of each of several ranks went, and what they sent beside what the link can carry."""
    if world.size == 1:
        return {}
    size = distributed.gradient_bytes(model)
    return trainer.rank_times.metrics() | {
        "communication/bytes_per_step": distributed.sent_bytes(size, world.size),
        "communication/link_bytes_per_second": distributed.link_bytes_per_second(size, world.device),
    }


def _tested(
    trainer: Trainer, test: EvaluationBatches, validated: Averages, job: Job, control: Control
) -> dict[str, float]:
    """What the test set says of the last network and, where images are kept apart, of the best epoch's.

    Args:
        trainer: after its last step; its network is the best epoch's in the end.
        test: the test set.
        validated: the last validation, which was on the test set where no images are kept apart.
        job: the whole run.
        control: given signs of life, since a large test set may take long.
    """

    def evaluated(network: nn.Module) -> Averages:
        return evaluate(network, test, trainer.precision, go_on, control.got_on)

    def go_on() -> bool:
        control.beat()
        return True

    final = evaluated(trainer.evaluated) if job.data.validation_count else validated
    figures = final.named("test") | {"test/count": final.count}
    if job.train.mirrored_evaluation:
        mirrored = evaluated(Mirrored(trainer.evaluated))
        figures["test/accuracy_mirrored"] = mirrored.accuracy
    if job.data.validation_count:
        best = final
        if trainer.early_stopping.best_step != trainer.step:
            distributed.wait_for_all()  # the first rank has it on disk
            saved = checkpoint.best(job.run_dir, partial(print, file=sys.stderr, flush=True))
            assert saved
            trainer.evaluated.load_state_dict(saved.model)
            best = evaluated(trainer.evaluated)
        figures |= {f"{name}_best": value for name, value in best.named("test").items()}
    return figures


def _epochs(trainer: Trainer, job: Job) -> dict[str, float]:
    """The best epoch where one is looked for, and the last one where that was not the plan's."""
    progress = trainer.early_stopping
    epochs: dict[str, float] = {}
    if job.data.validation_count or job.early_stopping.patience:
        epochs["best_epoch"] = progress.best_epoch
    if progress.is_over and trainer.epoch < job.plan.epochs:
        epochs["stopped_epoch"] = trainer.epoch
    return epochs


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


def _load(model: nn.Module, saved: Checkpoint) -> None:
    try:
        model.load_state_dict(saved.trained)
    except RuntimeError as error:
        raise ConfigError(f"model: the checkpoint is another network's: {error}") from error


def prepare_steps(trainer: Trainer, batches: TrainBatches, choice: str, world: World) -> None:
    """Compile, and let DDP choose its buckets, before the first step; one eager rank has nothing to prepare."""
    compiled = choice == "always"
    torch.manual_seed(batches.noise_seed(0))  # for what the network draws before its first epoch
    with trainer.stopwatch.span("compile" if compiled else "startup"):
        if compiled or world.size > 1:
            # Compiled code is made for one shape. Buckets only need gradients: two images give them at once.
            count = batches.batch_size if compiled else min(2, batches.batch_size)
            images, labels = fetch(batches.source, torch.arange(count))
            try:
                trainer.warm_up(batches.normalization(images), labels)
            except Exception as error:
                if type(error).__module__.startswith(COMPILER):
                    raise MachineError(f"train.compile=always: {error}. Type train.compile=auto") from error
                raise


def _capture_steps(trainer: Trainer, batches: TrainBatches, choice: str, world: World) -> None:
    """Replay each step as a CUDA graph from now on, where that can be: ``benchmarks/compiled.py`` compares.

    A rank that fails in the steps before its capture, where ranks wait for each other, is the launcher's to notice.
    """
    with trainer.stopwatch.span("compile"):
        problem = ""
        try:
            trainer.capture(batches, cuda_graph)
        except RuntimeError as error:
            problem = str(error) or type(error).__name__
        failures = distributed.sum_over_ranks(torch.tensor(float(bool(problem)), device=world.device))
        if failures.item():  # on one rank alone, too: all of them take their steps in the same way
            trainer.release()
            if problem or world.is_first:
                why = problem or "another rank's cannot be captured"
                print(f"train.compile={choice}: steps are launched one by one, since {why}", flush=True)


def _optimizer(job: Job, model: nn.Module) -> Optimizer:
    """The optimizer, on a GPU fused into one kernel where torch has that; what it refuses is the user's to mend."""
    make = job.make_optimizer
    target = make.func if isinstance(make, partial) else make
    chosen = make.keywords if isinstance(make, partial) else {}
    settings: dict[str, Any] = {}
    if job.accelerator == "gpu" and not {"fused", "foreach", "differentiable"} & chosen.keys():
        takes = inspect.signature(target).parameters
        wanted = ("fused", "capturable") if job.train.compile != "never" else ("fused",)
        settings = {name: True for name in wanted if "fused" in takes and name in takes and name not in chosen}
    try:
        return make(model.parameters(), lr=job.plan.learning_rates[0], **settings)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: its settings do not go together: {error}") from error


def _times(trainer: Trainer, global_batch_size: int) -> dict[str, float]:
    """Training time, the steady rate, and where all time went."""
    seconds = {"compile": 0.0, "communication": 0.0} | trainer.stopwatch.seconds
    train_seconds = sum(seconds[name] for name in ("data", "step", "communication"))
    blocks = trainer.block_rates[1:] or trainer.block_rates or [trainer.step * global_batch_size / train_seconds]
    return {
        "time/train_seconds": train_seconds,
        "steady_images_per_second": median(blocks),  # blocks of log_every steps, without the first, the warm-up
        **{f"time_split/{name}": value for name, value in seconds.items()},
    }


def _sample(source: Source) -> Tensor:
    """Images (N, 3, H, W) uint8 spread over the set, which may be sorted by class; the same on every rank.

    About 5,000, or as many larger ones as have the pixels of 5,000 of 32 x 32.
    """
    height, width = source.image_size
    wanted = max(1, min(5000, 5000 * 32 * 32 // (height * width)))
    return fetch(source, torch.arange(0, len(source), max(1, len(source) // wanted)))[0]


def fuse_layers(model: nn.Module, precision: torch.dtype) -> str:
    """Give ``model`` fused layers, in place; else say why it keeps its own: :mod:`cifar_exp.fused`."""
    try:
        from cifar_exp.fused import fused  # needs numba, which is an extra

        fused(model, precision)
    except ModuleNotFoundError as error:
        return f"there is {str(error)[:1].lower()}{str(error)[1:]}: pip install 'cifar-exp[cpu]'"
    except Exception as error:  # numba and LLVM have many
        return f"{type(error).__name__}: {error}"
    return ""


def resolve_precision(choice: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the hardware multiplies it natively, else float32."""
    if choice == "auto":
        choice = "bf16" if _has_bf16(device) else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[choice]


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def _prepare_process(job: Job) -> None:
    _pin(job)
    torch.set_num_threads(job.threads)
    if job.accelerator == "cpu":
        keep_freed_memory()
    # Batches keep their shape, for which the fastest algorithms are worth finding: others may be found another time.
    torch.backends.cudnn.benchmark = not job.train.deterministic
    if job.train.precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False  # on by default for convolutions
    if job.train.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is repeatable only with a fixed workspace
        torch.use_deterministic_algorithms(mode=True)


def _pin(job: Job) -> None:
    """Keep each CPU rank on cores of its own, where the ranks take all of them.

    Threads that wander evict each other's caches. A run that leaves cores free is left to the system: another run would
    choose the same ones. Threads that are started from now on inherit it.
    """
    cores = sorted(os.sched_getaffinity(0))
    if job.accelerator == "cpu" and job.plan.world_size * job.threads == len(cores):
        first = int(os.environ["LOCAL_RANK"]) * job.threads
        os.sched_setaffinity(0, cores[first : first + job.threads])
