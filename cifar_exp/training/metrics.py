"""The metrics of training and evaluation: sums on the device for each batch, divided once after the all-reduce.

To add a metric, add it to ``METRICS``. It is then logged in the journal and in MLflow as ``step/...``, ``train/...``,
``val/...`` and ``test/...``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cifar_exp.system.accelerator import exact, exact_device

# Name -> function that returns the metric's sum over the images of a batch. Its arguments are the batch's mean loss, ()
# float64 (float32 on MPS); the logits, (N, classes) float; the labels, (N,) int64. The reported value is this sum
# divided by ``count``. Checkpoints store the sums in this order: append a new metric at the end.
METRICS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor | int]] = {
    "loss": lambda mean_loss, logits, labels: mean_loss * labels.shape[0],  # noqa: ARG005
    "accuracy": lambda mean_loss, logits, labels: (logits.argmax(1) == labels).sum(),  # noqa: ARG005
    "count": lambda mean_loss, logits, labels: labels.shape[0],  # noqa: ARG005
}


class MetricSums:
    """The sums of ``METRICS`` over batches. They stay on the device until they are read.

    Sums are float64, so that counts are exact and losses keep their digits over many images. MPS has no float64:
    there they are float32 until they are read. Counts stay exact for 16 million images.
    """

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float64 if exact_device(device) == device else torch.float32
        self.sums = torch.zeros(len(METRICS), dtype=dtype, device=device)

    def add(self, mean_loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one batch. ``mean_loss``: () float; ``logits``: (N, classes); ``labels``: (N,) int64."""
        mean_loss = mean_loss.to(self.sums.dtype)
        for position, batch_sum in enumerate(METRICS.values()):
            self.sums[position] += batch_sum(mean_loss, logits, labels)

    def read_and_reset(self) -> Tensor:
        """The sums so far, (metrics,) float64. Reset in place: a captured CUDA graph adds to the same memory."""
        sums = self.read()
        self.sums.zero_()
        return sums

    def read(self) -> Tensor:
        """The sums so far, (metrics,) float64, on the device of the all-reduce (the CPU for MPS)."""
        return exact(self.sums.clone())


def no_sums(device: torch.device) -> Tensor:
    """The sums over no batch, (metrics,) float64, on the device of the all-reduce."""
    return torch.zeros(len(METRICS), dtype=torch.float64, device=exact_device(device))


def completed(sums: Tensor) -> Tensor:
    """The sums of a checkpoint, (metrics,). Metrics that were added later are NaN."""
    return torch.cat([sums, sums.new_full((len(METRICS) - len(sums),), math.nan)])


@dataclass(frozen=True)
class MetricValues:
    """The metrics over ``count`` images.

    Attributes:
        loss: mean loss.
        accuracy: 0 to 1.
        count: number of images.
        others: the other metrics of ``METRICS``, by name.
    """

    loss: float
    accuracy: float
    count: int
    others: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, sums: Tensor) -> "MetricValues":
        """Divide sums that were all-reduced over ranks. ``sums``: (metrics,), in the order of ``METRICS``."""
        totals = dict(zip(METRICS, sums.tolist(), strict=True))
        count = int(totals.pop("count"))
        # An evaluation that is interrupted before its first batch has no images.
        values = {name: total / count if count else math.nan for name, total in totals.items()}
        return cls(values.pop("loss"), values.pop("accuracy"), count, values)

    def named(self, prefix: str) -> dict[str, float]:
        """The values by their MLflow names: ``{prefix}/loss``, ``{prefix}/accuracy``, ..."""
        values = {"loss": self.loss, "accuracy": self.accuracy, **self.others}
        return {f"{prefix}/{name}": value for name, value in values.items()}
