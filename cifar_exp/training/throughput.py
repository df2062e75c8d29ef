"""Images per second for each block of ``train.log_every`` steps, and the steady-state throughput."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

ENOUGH_BLOCKS = 10  # with fewer the steady state is a rough figure, and is marked


@dataclass
class Throughput:
    """The blocks of a run. A block may span two epochs. Its seconds only include training steps.

    Attributes:
        rates: images/s of each block, over all ranks.
        steps: steps of each block.
        open_images: images so far in the unfinished block.
        open_steps: its steps so far.
        open_seconds: its time so far.
    """

    rates: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    open_images: int = 0
    open_steps: int = 0
    open_seconds: float = 0.0

    def add(self, images: int, seconds: float) -> None:
        """Add images and seconds to the unfinished block. The caller counts its steps in ``open_steps``."""
        self.open_images += images
        self.open_seconds += seconds

    def end_block(self) -> float:
        """End the block. Returns its images/s."""
        rate = self.open_images / self.open_seconds
        self.rates.append(rate)
        self.steps.append(self.open_steps)
        self.open_images, self.open_steps, self.open_seconds = 0, 0, 0.0
        return rate

    def steady(self) -> tuple[float, int, int] | None:
        """The median over the blocks, weighted by their steps, without the first one, which is warm-up.

        The steps after the last whole block count as a block.

        Returns:
            Images/s, and the number of steps and blocks it was computed from; None without any step.
        """
        blocks = list(zip(self.rates, self.steps, strict=True))
        if self.open_steps and self.open_images:
            blocks.append((self.open_images / self.open_seconds, self.open_steps))
        blocks = blocks[1:] or blocks
        if not blocks:
            return None
        return weighted_median(blocks), sum(steps for _, steps in blocks), len(blocks)

    def state_dict(self) -> dict[str, Any]:
        """The state for :meth:`load`."""
        return asdict(self)

    @classmethod
    def load(cls, state: Mapping[str, Any], log_every: int) -> "Throughput":
        """Load the blocks of a checkpoint. Earlier versions saved only rates, each of ``log_every`` steps."""
        if "throughput" in state:
            return cls(**state["throughput"])
        rates = list(state["block_rates"])
        return cls(rates, [log_every] * len(rates))


def weighted_median(blocks: list[tuple[float, int]]) -> float:
    """The weighted median of (value, weight) pairs; the mean of two values if the half weight falls between them."""
    ordered = sorted(blocks)
    half, below = sum(weight for _, weight in ordered) / 2, 0
    for place, (value, weight) in enumerate(ordered):
        below += weight
        if below == half:
            return (value + ordered[place + 1][0]) / 2
        if below > half:
            return value
    raise ValueError("there is no block")
