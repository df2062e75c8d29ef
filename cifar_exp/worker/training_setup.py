"""Build one rank's model, optimizer, trainer and batches."""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cifar_exp.data.batches import EvaluationBatches, Normalization, TrainBatches, scaled_size
from cifar_exp.data.sources import Source, fetch
from cifar_exp.distributed import data_parallel
from cifar_exp.distributed.batch_norm import synchronize_layers
from cifar_exp.distributed.process_group import World
from cifar_exp.distributed.rank_control import RankControl
from cifar_exp.errors import ConfigError
from cifar_exp.models.build import InitializedFromImages, arrange, compile_in_place, initialize_from_images, seeded
from cifar_exp.records.checkpoint import Checkpoint
from cifar_exp.system.accelerator import layout, resolve_precision
from cifar_exp.training.early_stopping import EarlyStopping
from cifar_exp.training.step import TrainStep
from cifar_exp.training.trainer import ReportMetrics, Trainer
from cifar_exp.worker.job import Job


@dataclass(frozen=True)
class TrainingSetup:
    """One rank's model, trainer and batches.

    Attributes:
        model: the network itself, without DDP.
        trainer: trains it.
        batches: this rank's batches of the training images.
        test: this rank's batches of the test images.
    """

    model: nn.Module
    trainer: Trainer
    batches: TrainBatches
    test: EvaluationBatches


def build_training_setup(
    job: Job,
    world: World,
    control: RankControl,
    report: ReportMetrics,
    train_images: Source,
    test_images: Source,
    saved: Checkpoint | None = None,
) -> TrainingSetup:
    """Build everything on this rank's device.

    Args:
        job: the run.
        world: this rank among the others.
        control: gets heartbeats and stop points.
        report: gets the metrics during training.
        train_images: the training split.
        test_images: the test set.
        saved: the checkpoint with the network's weights; None: initial values.
    """
    normalization = Normalization.of(job.train.normalization, job.data.mean, job.data.std)
    precision = resolve_precision(job.train.precision, world.device)
    model = _build_model(job, world, normalization, train_images, saved)
    _compile_or_fuse(model, job, world, precision)
    trainer = _build_trainer(job, world, control, report, model, precision)
    batches = TrainBatches(
        train_images,
        job.augmentation,
        normalization,
        job.seed,
        world.rank,
        world.size,
        job.plan.per_device_batch_size,
        job.plan.image_scales,
        job.plan.accumulate,
    )
    test = EvaluationBatches(test_images, normalization, world.rank, world.size, scale=job.plan.image_scales[-1])
    return TrainingSetup(model, trainer, batches, test)


def _build_trainer(
    job: Job, world: World, control: RankControl, report: ReportMetrics, model: nn.Module, precision: torch.dtype
) -> Trainer:
    parallel, communication = data_parallel.data_parallel(model, world, has_unused=job.has_unused)
    step = TrainStep(
        model=parallel,
        optimizer=_build_optimizer(job, model),
        precision=precision,
        label_smoothing=job.train.label_smoothing,
        communication=communication,
        control=control,
        ema_decay=job.train.weight_averaging,
    )
    return Trainer(
        step,
        learning_rates=job.plan.learning_rates,
        log_every=job.train.log_every,
        report=report,
        batch_norm=job.train.batch_norm,
        early_stopping=EarlyStopping(job.early_stopping),
    )


def _build_model(
    job: Job, world: World, normalization: Normalization, train_images: Source, saved: Checkpoint | None
) -> nn.Module:
    """The network with the weights of ``saved`` or its initial ones."""
    size = scaled_size(job.data.image_size, job.plan.image_scales[-1])
    model = seeded(job.make_model, len(job.data.classes), job.seed, size)
    model = arrange(model.to(world.device), layout(world.device))
    if saved:
        _load_weights(model, saved)
    elif any(isinstance(module, InitializedFromImages) for module in model.modules()):
        initialize_from_images(model, normalization(_sample(train_images)))
    if job.train.batch_norm == "synchronized" and world.size > 1:
        model = synchronize_layers(model, world.device)
    return model


def _load_weights(model: nn.Module, saved: Checkpoint) -> None:
    try:
        model.load_state_dict(saved.trained)
    except RuntimeError as error:
        raise ConfigError(
            f"model: the checkpoint is of another network: {error}. Set model=<that network>, or resume=never"
        ) from error


def _compile_or_fuse(model: nn.Module, job: Job, world: World, precision: torch.dtype) -> None:
    """Apply ``train.compile``: ``always`` compiles the network, ``auto`` fuses the layers of CPU ranks."""
    if job.train.compile == "always":
        compile_in_place(model)
    elif job.train.compile == "auto" and job.accelerator == "cpu":
        problem = _fuse_layers(model, precision)
        if problem and world.is_first:
            print(f"train.compile=auto: layers are not fused ({problem}): using PyTorch's own", flush=True)


def _fuse_layers(model: nn.Module, precision: torch.dtype) -> str | None:
    """Fuse the layers of ``model`` in place. Returns the problem if that is not possible."""
    try:
        from cifar_exp.cpu_kernels.fuse import fuse  # an optional part of the package
    except ModuleNotFoundError as error:
        return str(error)
    return fuse(model, precision)


def _build_optimizer(job: Job, model: nn.Module) -> Optimizer:
    """Build the optimizer. On a GPU it uses torch's fused kernel if there is one.

    Raises:
        ConfigError: the optimizer refuses its settings.
    """
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
        raise ConfigError(
            f"optimizer: its settings cannot be combined: {error}. Set optimizer.<setting>=<another value>"
        ) from error


def _sample(source: Source) -> Tensor:
    """About 5,000 images, (N, 3, H, W) uint8, taken at equal distances from the set, which may be sorted by class.

    The sample is the same on every rank. If images are larger than 32 x 32, it has fewer of them and about as many
    pixels.
    """
    height, width = source.image_size
    wanted = max(1, min(5000, 5000 * 32 * 32 // (height * width)))
    return fetch(source, torch.arange(0, len(source), max(1, len(source) // wanted)))[0]
