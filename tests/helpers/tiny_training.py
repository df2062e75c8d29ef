"""A tiny network, its trainer and its images: three steps of training on any number of ranks."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from cifar_exp.config.schema import EarlyStoppingSettings
from cifar_exp.data.augment import Crop
from cifar_exp.data.batches import EvaluationBatches, Normalization, TrainBatches
from cifar_exp.data.dataset_files import Split
from cifar_exp.distributed.data_parallel import data_parallel
from cifar_exp.distributed.process_group import World
from cifar_exp.models.build import seeded
from cifar_exp.models.networks import convnet
from cifar_exp.training.early_stopping import EarlyStopping
from cifar_exp.training.step import TrainStep
from cifar_exp.training.trainer import Trainer
from tests.helpers.defaults import with_defaults

NORMALIZATION = Normalization(shift=(128.0, 127.0, 126.0), scale=(1 / 64, 1 / 64, 1 / 64))
CROP = with_defaults(Crop)()
LR = 0.1


def tiny_model() -> nn.Module:
    """A seeded tiny convnet whose running batch-norm statistics differ from their initial values."""
    model = seeded(partial(convnet, width=4, depth=1), 10, seed=1)
    model(NORMALIZATION(images(24, seed=99).images))
    return model


def images(count: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Split(pixels, torch.randint(0, 10, (count,), generator=generator))


def vector(tensors: Iterator[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().clone() for tensor in tensors])


def floating_buffers(model: nn.Module) -> Iterator[Tensor]:
    return (buffer for buffer in model.buffers() if buffer.is_floating_point())


def gradient_of(model: nn.Module) -> Tensor:
    return vector(parameter.grad for parameter in model.parameters() if parameter.grad is not None)


def trainer(world: World, log_every: int = 1) -> tuple[Trainer, nn.Module, list[tuple[int, int, dict[str, float]]]]:
    """A trainer, its network, and the metrics that it reports."""
    model = tiny_model()
    parallel, exposed = data_parallel(model, world)
    reports: list[tuple[int, int, dict[str, float]]] = []
    step = TrainStep(
        model=parallel,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9),
        precision=torch.float32,
        label_smoothing=0.0,
        communication=exposed,
    )
    made = Trainer(
        step,
        learning_rates=(LR, LR / 2, LR / 4),
        log_every=log_every,
        report=lambda step, epoch, metrics: reports.append((step, epoch, metrics)),
        batch_norm="averaged",
        early_stopping=EarlyStopping(EarlyStoppingSettings(patience=None, metric="val/loss", min_delta=0.0)),
    )
    return made, model, reports


def train_batches(
    world: World, normalization: Normalization = NORMALIZATION, accumulate: int = 1, batch: int = 16
) -> TrainBatches:
    """Three steps of global batch 16 over 50 images; two images are dropped."""
    share = batch // world.size // accumulate
    position = (world.rank, world.size, share)
    return TrainBatches(images(50, seed=7), CROP, normalization, 3, *position, accumulate=accumulate)


def validation(world: World) -> EvaluationBatches:
    return EvaluationBatches(images(9, seed=8), NORMALIZATION, world.rank, world.size)
