"""Loss and accuracy: sums while training runs, averages when they are read. No I/O."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cifar_exp.system.accelerator import exact, exact_device


class Totals:
    """Sum of losses, correct predictions and images. They stay on the device until they are read.

    Sums are float64, so that counts are exact and losses keep their digits over many images. MPS has no float64:
    there they are float32 until they are read. Counts stay exact for 16 million images.
    """

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float64 if exact_device(device) == device else torch.float32
        self.sums = torch.zeros(3, dtype=dtype, device=device)

    def add(self, mean_loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one batch. ``mean_loss``: () float; ``logits``: (N, classes); ``labels``: (N,) int64."""
        count = labels.shape[0]
        correct = (logits.argmax(1) == labels).sum()
        self.sums[0] += mean_loss.to(self.sums.dtype) * count
        self.sums[1] += correct
        self.sums[2] += count

    def take(self) -> Tensor:
        """The sums so far, (3,) float64. They are reset in place, since a captured step adds to the same memory."""
        sums = self.read()
        self.sums.zero_()
        return sums

    def read(self) -> Tensor:
        """The sums so far, (3,) float64, on the device where sums over ranks are made."""
        return exact(self.sums.clone())


@dataclass(frozen=True)
class Averages:
    """Loss and accuracy over ``count`` images."""

    loss: float
    accuracy: float
    count: int

    @classmethod
    def of(cls, sums: Tensor) -> "Averages":
        """Divide once, after the sums were reduced over ranks. ``sums``: (3,) as in :class:`Totals`."""
        loss, correct, count = sums.tolist()
        if not count:
            return cls(math.nan, math.nan, 0)  # as in an evaluation that was interrupted before its first batch
        return cls(loss / count, correct / count, int(count))

    def named(self, prefix: str) -> dict[str, float]:
        """As metrics: ``{prefix}/loss`` and ``{prefix}/accuracy``."""
        return {f"{prefix}/loss": self.loss, f"{prefix}/accuracy": self.accuracy}
