"""The curves of a run: points from the journal, thinned and smoothed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cifar_exp.records.journal import Entry

MAX_POINTS = 600  # per curve; more points than pixels show nothing more
SMOOTHING_EPOCHS = 0.25  # time constant of the smoothed curves
Point = tuple[float, float]  # (iteration, value)


@dataclass(frozen=True)
class PageFacts:
    """Facts about a run for the page and the figure, in addition to the journal.

    Attributes:
        title: for example ``convnet 32x4 on CIFAR-10``.
        status: ``starting``, ``running``, ``finished``, ``failed`` or ``stopped``.
        epochs: planned epochs.
        steps_per_epoch: iterations of an epoch.
        lr_drops: (epochs after which the learning rate changes, the new rate).
        details: names and texts of the table beside the plot.
        ended_early: why training ended before its last step; empty if it did not.
    """

    title: str
    status: str
    epochs: int
    steps_per_epoch: int
    lr_drops: Sequence[tuple[int, float]]
    details: Mapping[str, str]
    ended_early: str = ""


@dataclass(frozen=True)
class Curves:
    """One quantity over the iterations, thinned for drawing.

    Attributes:
        raw: training, as measured.
        smooth: training, averaged over about a quarter of an epoch.
        validation: after each epoch.
    """

    raw: Sequence[Point]
    smooth: Sequence[Point]
    validation: Sequence[Point]

    @classmethod
    def of(cls, entries: Sequence[Entry], quantity: str, steps_per_epoch: int) -> "Curves":
        """``quantity``: ``loss`` or ``accuracy``."""
        # A run shorter than `train.log_every` steps has no points but its epochs'.
        training = series(entries, f"step/{quantity}") or series(entries, f"train/{quantity}")
        smooth = smoothed(averaged(training), SMOOTHING_EPOCHS * steps_per_epoch)
        return cls(thinned(training), smooth, thinned(series(entries, f"val/{quantity}")))


def series(entries: Sequence[Entry], name: str) -> list[Point]:
    """One metric over the iterations."""
    return [(entry.step, entry.metrics[name]) for entry in entries if name in entry.metrics]


def smoothed(points: Sequence[Point], steps: float) -> list[Point]:
    """Exponential average over about ``steps`` iterations. A value that is not finite is kept, but not averaged."""
    result: list[Point] = []
    total = weight = previous = 0.0
    for step, value in points:
        if math.isfinite(value):
            decay = math.exp((previous - step) / steps)
            total = total * decay + value
            weight = weight * decay + 1  # sum of the weights, which corrects the bias of the first values towards zero
            previous, value = step, total / weight
        result.append((step, value))
    return result


def thinned(points: Sequence[Point], limit: int = MAX_POINTS) -> Sequence[Point]:
    """At most ``limit`` points: the first, the last, and the lowest and highest of each stretch between them.

    A stretch with values that are not finite keeps one of them, which leaves a gap, and its highest value.
    """
    if len(points) <= limit:
        return points
    values = [value for _, value in points]
    kept = {0, len(points) - 1}
    for start, end in _stretches(1, len(points) - 1, (limit - 2) // 2):
        stretch = values[start:end]
        if not math.isfinite(sum(stretch)):
            stretch = [value if math.isfinite(value) else -math.inf for value in stretch]
        kept.add(start + stretch.index(min(stretch)))
        kept.add(start + stretch.index(max(stretch)))
    return [points[index] for index in sorted(kept)]


def averaged(points: Sequence[Point], limit: int = MAX_POINTS) -> Sequence[Point]:
    """At most ``limit`` means over stretches of equal length, each at the iteration of its last point."""
    if len(points) <= limit:
        return points
    values = [value for _, value in points]
    return [
        (points[end - 1][0], sum(values[start:end]) / (end - start)) for start, end in _stretches(0, len(points), limit)
    ]


def _stretches(start: int, end: int, count: int) -> Iterator[tuple[int, int]]:
    """``count`` ranges of about equal length that make up ``start`` to ``end``."""
    return pairwise(start + (end - start) * number // count for number in range(count + 1))


def axis_epochs(step: int, facts: PageFacts) -> int:
    """The epochs that the plot shows: all, half, a quarter, ... of them, as long as the completed steps fit.

    So the curves fill at least half of the plot, and the scale changes only a few times in a run.
    """
    shown = facts.epochs
    while shown > 1 and math.ceil(shown / 2) * facts.steps_per_epoch >= step:
        shown = math.ceil(shown / 2)
    return shown


def tick_step(span: float, most: int) -> float:
    """The smallest of ..., 0.1, 0.2, 0.5, 1, 2, 5, 10, ... that divides ``span`` into at most ``most`` parts."""
    power = math.pow(10, math.floor(math.log10(span / most)))
    return next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= most * (1 + 1e-9))


def loss_top(loss: Curves) -> float:
    """The upper end of the loss axis: the highest loss, without bursts far above the 90th percentile."""
    values = sorted(value for _, value in (*loss.raw, *loss.validation) if math.isfinite(value))
    if not values or values[-1] <= 0:
        return 1.0
    highest = min(values[-1], 5 * values[math.ceil(0.9 * (len(values) - 1))])
    step = tick_step(highest, 5)
    return step * math.ceil(highest / step)
