"""Loss and accuracy of a network on a data set, summed over ranks."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifar_exp.data.batches import EvaluationBatches
from cifar_exp.distributed.collectives import sum_over_ranks
from cifar_exp.training.metrics import Averages, Totals


def evaluate(
    model: nn.Module,
    batches: EvaluationBatches,
    precision: torch.dtype,
    go_on: Callable[[], bool] = lambda: True,
    waiting: Callable[[], None] = lambda: None,
) -> Averages:
    """Loss and accuracy over the whole set: every rank evaluates its shard, sums and counts are reduced.

    ``go_on`` is asked before each batch; a rank that is told not to leaves the rest of its shard out. ``waiting`` is
    called when this rank is done with its shard and may have to wait for others.
    """
    model.eval()
    totals = Totals(batches.source.device)
    with torch.inference_mode(), autocast(batches.source.device, precision):
        for images, labels in batches:
            if not go_on():
                break
            logits = model(images)
            totals.add(F.cross_entropy(logits.float(), labels), logits, labels)
    waiting()
    return Averages.of(sum_over_ranks(totals.take()))


class Mirrored(nn.Module):
    """The mean of a network's logits for each image and for its mirror image."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """``images``: (N, 3, H, W) -> (N, classes)."""
        logits: Tensor = (self.network(images) + self.network(images.flip(3))) / 2
        return logits


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[None]:
    """Compute convolutions and matrix products in ``precision``; float32 switches it off."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)
