"""What the benchmarks train: the reference network and recipe, put together from the package's own parts."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from cifar_exp.array_cache import Split
from cifar_exp.augment import Augmentation, Crop
from cifar_exp.data import EvaluationBatches, Normalization, TrainBatches
from cifar_exp.distributed import World, data_parallel, joined_world
from cifar_exp.models import convnet, seeded
from cifar_exp.process import keep_freed_memory
from cifar_exp.train import Trainer
from cifar_exp.worker import fuse_layers, resolve_precision

BATCH = 256
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)  # of CIFAR-10's channels, 0..255
NORMALIZATION = Normalization.of("zerocenter", MEAN, STD)
PRECISION = resolve_precision("auto", torch.device("cpu"))
FLIP_AND_SHIFT = Crop()  # by whole pixels, as torchvision's RandomHorizontalFlip and RandomCrop(32, padding=4)
CORES = len(os.sched_getaffinity(0))


def random_split(count: int) -> Split:
    """Noise instead of images: the speed of a step does not depend on what is in the pictures."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 10, (count,), generator=generator))


def train_batches(
    split: Split, world: World, augmentation: Augmentation = FLIP_AND_SHIFT, batch: int = BATCH
) -> TrainBatches:
    """A rank's batches as in a run: order, augmentation, normalisation."""
    return TrainBatches(split, augmentation, NORMALIZATION, 0, world.rank, world.size, batch)


def evaluation_batches(split: Split, world: World) -> EvaluationBatches:
    """A rank's share of a test set."""
    return EvaluationBatches(split, NORMALIZATION, world.rank, world.size)


def network() -> tuple[nn.Module, Optimizer]:
    """The reference network, channels-last, and the recipe's optimizer."""
    model = seeded(convnet, 10, 0).to(memory_format=torch.channels_last)
    return model, SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-10)


def fused_network() -> tuple[nn.Module, Optimizer]:
    """The same with the layers that it trains with on CPUs."""
    model, optimizer = network()
    problem = fuse_layers(model, PRECISION)
    assert not problem, problem
    return model, optimizer


def trainer(world: World, log_every: int = 10) -> Trainer:
    """The package's loop around the reference network, as ``worker.train`` builds it; it reports to nobody.

    The process keeps the memory that it frees, as ranks do: a bare loop that shares it has the benefit, too.
    """
    keep_freed_memory()
    model, optimizer = fused_network()
    parallel, communication = data_parallel(model, world)
    return Trainer(
        model=parallel,
        optimizer=optimizer,
        learning_rates=(0.01,) * 100_000,  # more steps than any benchmark takes
        precision=PRECISION,
        label_smoothing=0.0,
        log_every=log_every,
        report=lambda *_: None,
        communication=communication,
    )


def epoch_of(loop: Trainer, batches: TrainBatches) -> Callable[[], None]:
    """One pass of the package's loop over ``batches`` a call."""

    def epoch() -> None:
        loop.train_one_epoch(1, batches)
        loop.close_epoch(1, batches)

    return epoch


@contextmanager
def alone(folder: Path) -> Iterator[World]:
    """The calling process as the only rank."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with joined_world("cpu", folder, 600) as world:
        yield world
