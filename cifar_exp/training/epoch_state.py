"""The state of an epoch that was interrupted before its end."""

from dataclasses import dataclass, field

from torch import Tensor

from cifar_exp.training.stopwatch import Stopwatch


@dataclass
class Unfinished:
    """An epoch in the midst.

    Attributes:
        sums: loss, correct predictions and images so far over all ranks, (3,) float64; what ranks have
            added since they last read them is not in it.
        steps: of the epoch that are done.
        watch: the epoch's time so far.
        block_seconds: of it, up to when the sums were last read.
    """

    sums: Tensor
    steps: int = 0
    watch: Stopwatch = field(default_factory=Stopwatch)
    block_seconds: float = 0.0
