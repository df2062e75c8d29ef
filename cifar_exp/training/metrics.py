"""Sums, counts and stopwatches. No I/O."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


class Totals:
    """Loss sum, correct predictions and images, kept on the device until somebody reads them.

    Sums are kept in float64 on CPU and CUDA alike, so that ten thousand images add up exactly.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, mean_loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one batch. ``mean_loss``: () float; ``logits``: (N, classes); ``labels``: (N,) int64."""
        count = labels.shape[0]
        correct = (logits.argmax(1) == labels).sum()
        self.sums[0] += mean_loss.double() * count
        self.sums[1] += correct
        self.sums[2] += count

    def take(self) -> Tensor:
        """The sums so far, (3,) float64; counting starts again at zero, in place: a captured step adds there."""
        sums = self.sums.clone()
        self.sums.zero_()
        return sums


@dataclass(frozen=True)
class Averages:
    """Loss and accuracy over ``count`` images."""

    loss: float
    accuracy: float
    count: int

    @classmethod
    def of(cls, sums: Tensor) -> "Averages":
        """Divide once, after all sums have been reduced. ``sums``: (3,) as kept by :class:`Totals`."""
        loss, correct, count = sums.tolist()
        if not count:
            return cls(math.nan, math.nan, 0)  # no images, as where an evaluation was left at once
        return cls(loss / count, correct / count, int(count))

    def named(self, prefix: str) -> dict[str, float]:
        """As metrics: ``{prefix}/loss`` and ``{prefix}/accuracy``."""
        return {f"{prefix}/loss": self.loss, f"{prefix}/accuracy": self.accuracy}
