"""Sums, counts and stopwatches. No I/O."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cifar_exp.system.accelerator import exact, exact_device


class Totals:
    """Loss sum, correct predictions and images, kept on the device until somebody reads them.

    Sums are kept in float64 on CPU and CUDA alike, so that ten thousand images add up exactly. On MPS, which has none,
    in float32 until they are read, which is exact for 16 million images; losses lose their last digit.
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
        """The sums so far, (3,) float64; counting starts again at zero, in place: a captured step adds there."""
        sums = self.read()
        self.sums.zero_()
        return sums

    def read(self) -> Tensor:
        """The sums so far, (3,) float64, where sums of the device are added up over ranks."""
        return exact(self.sums.clone())


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
