"""The workload of the benchmarks: the reference network and recipe, built from the package's components.

It runs on the first GPU if there is one. Set ``CUDA_VISIBLE_DEVICES=`` before a command to measure the CPU.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.utils.flop_counter import FlopCounterMode

from cifar_exp.config.defaults import settings_of
from cifar_exp.config.schema import EarlyStoppingSettings
from cifar_exp.cpu_kernels.fuse import fuse
from cifar_exp.data.augment import Augmentation, Crop, Shift
from cifar_exp.data.batches import EvaluationBatches, Normalization, TrainBatches
from cifar_exp.data.dataset_files import Split
from cifar_exp.distributed.data_parallel import data_parallel
from cifar_exp.distributed.process_group import World, joined_world
from cifar_exp.models.build import ModelFactory, seeded
from cifar_exp.models.networks import convnet
from cifar_exp.system.accelerator import resolve_precision
from cifar_exp.system.process import keep_freed_memory
from cifar_exp.training.cuda_graph import cuda_graph
from cifar_exp.training.early_stopping import EarlyStopping
from cifar_exp.training.step import TrainStep
from cifar_exp.training.trainer import Trainer

BATCH = 256
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)  # of CIFAR-10's channels, 0..255
NORMALIZATION = Normalization.of("zerocenter", MEAN, STD)
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
PRECISION = resolve_precision("auto", DEVICE)
REFERENCE_NETWORK = partial(convnet, **settings_of("model", "convnet"))
REAL_VALUED_SHIFT = Shift(**settings_of("augment", "shift"))
# By whole pixels, as torchvision's RandomHorizontalFlip and RandomCrop(32, padding=4).
FLIP_AND_SHIFT = Crop(**settings_of("augment", "crop"))
CORES = len(os.sched_getaffinity(0))


def random_split(count: int) -> Split:
    """Random noise as images: the speed of a step does not depend on their content."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(0, 10, (count,), generator=generator))


def train_batches(
    split: Split, world: World, augmentation: Augmentation = FLIP_AND_SHIFT, batch: int = BATCH
) -> TrainBatches:
    """A rank's training batches as in a run: shuffled, augmented and normalised."""
    return TrainBatches(split.to(DEVICE), augmentation, NORMALIZATION, 0, world.rank, world.size, batch)


def evaluation_batches(split: Split, world: World) -> EvaluationBatches:
    """A rank's share of a test set."""
    return EvaluationBatches(split.to(DEVICE), NORMALIZATION, world.rank, world.size)


def network(build: ModelFactory = REFERENCE_NETWORK) -> tuple[nn.Module, Optimizer]:
    """The reference network or another one, channels-last, and the recipe's optimizer, on a GPU a fused one.

    cuDNN chooses its algorithms by trying them, as it does in ranks.
    """
    torch.backends.cudnn.benchmark = True
    model = seeded(build, 10, 0).to(DEVICE).to(memory_format=torch.channels_last)
    return model, SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-10, fused=ON_GPU)


def fused_network(
    build: ModelFactory = REFERENCE_NETWORK, precision: torch.dtype = PRECISION
) -> tuple[nn.Module, Optimizer]:
    """The network with fused layers, as it is trained on CPUs."""
    model, optimizer = network(build)
    if not ON_GPU:
        problem = fuse(model, precision)
        assert problem is None, problem
    return model, optimizer


def trainer(world: World, log_every: int = 10) -> Trainer:
    """The package's loop around the reference network, as ``worker.train`` builds it; it reports to nobody.

    The process keeps the memory that it frees, as ranks do: a bare loop that shares it has the benefit, too.
    """
    if not ON_GPU:
        keep_freed_memory()
    model, optimizer = fused_network()
    parallel, communication = data_parallel(model, world)
    step = TrainStep(parallel, optimizer, PRECISION, label_smoothing=0.0, communication=communication)
    rates = (0.01,) * 100_000  # more steps than any benchmark takes
    stopping = EarlyStopping(EarlyStoppingSettings(patience=None, metric="val/loss", min_delta=0.0))
    return Trainer(step, rates, log_every, lambda *_: None, batch_norm="averaged", early_stopping=stopping)


def training_flop(model: nn.Module, size: tuple[int, int] = (32, 32)) -> float:
    """Multiplications and additions for one image of ``size``, forward and backward, by PyTorch's counter."""
    images = torch.zeros(2, 3, *size, device=next(model.parameters()).device)  # batch norm needs more than one image
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return counter.get_total_flops() / len(images)


def turn_steps(steps: int) -> int:
    """Steps per turn: ``steps`` on CPUs; on a GPU an epoch of CIFAR-10, since fewer steps would be too short."""
    return 195 if ON_GPU else steps


def synchronize() -> None:
    """Wait until the GPU has finished all its work; do nothing on CPUs."""
    if ON_GPU:
        torch.cuda.synchronize()


def prepare(loop: Trainer, batches: TrainBatches) -> None:
    """Prepare the first step as a run does: on a GPU, capture the step."""
    if ON_GPU:
        loop.train_step.capture(batches, cuda_graph)


def epoch_of(loop: Trainer, batches: TrainBatches) -> Callable[[], None]:
    """A function that trains one pass over ``batches`` with the package's loop."""
    prepare(loop, batches)

    def epoch() -> None:
        loop.train_one_epoch(1, batches)
        loop.close_epoch(1, batches)

    return epoch


@contextmanager
def alone(folder: Path) -> Iterator[World]:
    """The process group of a single rank, this process."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    with joined_world("gpu" if ON_GPU else "cpu", folder, 600) as world:
        yield world
