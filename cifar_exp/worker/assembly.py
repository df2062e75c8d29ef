"""Build all that one rank trains with: model, optimizer, trainer, batches."""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cifar_exp.cpu_kernels.fuse import fuse_layers
from cifar_exp.data.batches import EvaluationBatches, Normalization, TrainBatches
from cifar_exp.data.sources import Source, fetch
from cifar_exp.distributed import data_parallel
from cifar_exp.distributed.batch_norm import synchronized
from cifar_exp.distributed.heartbeat import Control
from cifar_exp.distributed.process_group import World
from cifar_exp.errors import ConfigError
from cifar_exp.models.networks import InitializedFromImages, initialize_from_images, seeded
from cifar_exp.records.checkpoint import Checkpoint
from cifar_exp.system.accelerator import layout, resolve_precision
from cifar_exp.training.early_stopping import EarlyStopping
from cifar_exp.training.trainer import Report, Trainer
from cifar_exp.worker.job import Job


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
    model = model.to(world.device).to(memory_format=layout(world.device))
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
    parallel, communication = data_parallel.data_parallel(model, world)
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


def _load(model: nn.Module, saved: Checkpoint) -> None:
    try:
        model.load_state_dict(saved.trained)
    except RuntimeError as error:
        raise ConfigError(f"model: the checkpoint is another network's: {error}") from error


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


def _sample(source: Source) -> Tensor:
    """Images (N, 3, H, W) uint8 spread over the set, which may be sorted by class; the same on every rank.

    About 5,000, or as many larger ones as have the pixels of 5,000 of 32 x 32.
    """
    height, width = source.image_size
    wanted = max(1, min(5000, 5000 * 32 * 32 // (height * width)))
    return fetch(source, torch.arange(0, len(source), max(1, len(source) // wanted)))[0]
