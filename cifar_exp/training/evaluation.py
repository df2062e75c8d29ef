"""Loss and accuracy of a network on a dataset, over all ranks."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifar_exp.data.batches import EvaluationBatches
from cifar_exp.distributed.collectives import sum_over_ranks
from cifar_exp.training.metrics import MetricSums, MetricValues


def evaluate(
    model: nn.Module,
    batches: EvaluationBatches,
    precision: torch.dtype,
    may_continue: Callable[[], bool] = lambda: True,
    before_waiting: Callable[[], None] = lambda: None,
) -> MetricValues:
    """Loss and accuracy over the whole set: every rank evaluates its shard, then the metric sums are all-reduced.

    Args:
        model: the network.
        batches: this rank's shard.
        precision: dtype of convolutions and matrix products.
        may_continue: called before each batch; if it returns False, this rank skips the rest of its shard.
        before_waiting: called after the shard, before the all-reduce; training sends a heartbeat here.
    """
    model.eval()
    metric_sums = MetricSums(batches.source.device)
    with torch.inference_mode(), autocast(batches.source.device, precision):
        for images, labels in batches:
            if not may_continue():
                break
            logits = model(images)
            metric_sums.add(F.cross_entropy(logits.float(), labels), logits, labels)
    before_waiting()
    return MetricValues.of(sum_over_ranks(metric_sums.read_and_reset()))


class Mirrored(nn.Module):
    """Test-time augmentation: the mean of the logits of each image and of its mirror image."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """``images``: (N, 3, H, W) -> (N, classes)."""
        logits: Tensor = (self.network(images) + self.network(images.flip(3))) / 2
        return logits


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[None]:
    """Mixed precision: convolutions and matrix products in ``precision``; float32 switches it off."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)
