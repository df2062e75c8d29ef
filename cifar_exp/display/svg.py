"""The content of the page's plots for ``plots.html``: curves as SVG paths, ticks and grid as positions and texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cifar_exp.display.curves import Curves, PageFacts, Point, tick_step

PLANE = 1000  # units of the curves' plane, each way
MAX_BANDS = 40  # epoch bands; narrower ones flicker
ABSENT = "\u2013"  # a dash


def number_text(value: float | None, form: str) -> str:
    """The formatted value; a dash where it is unknown or not finite."""
    return ABSENT if value is None or not math.isfinite(value) else format(value, form)


class LearningRateDrop(NamedTuple):
    """A change of the learning rate: its place, the new rate, whether it is in the last fifth of the axis."""

    x: str
    label: str
    late: bool


@dataclass(frozen=True)
class Axis:
    """The iteration axis that both plots share. Places on it are texts in percent.

    Attributes:
        end: iterations that it spans.
        steps_per_epoch: iterations of an epoch.
        bands: path of every second epoch's band.
        epoch_ticks: places and numbers of epochs.
        iteration_ticks: places and numbers of iterations.
        drops: where the learning rate changes.
    """

    end: int
    steps_per_epoch: int
    bands: str
    epoch_ticks: Sequence[tuple[str, str]]
    iteration_ticks: Sequence[tuple[str, str]]
    drops: Sequence[LearningRateDrop]

    @classmethod
    def of(cls, epochs: int, facts: PageFacts) -> "Axis":
        """The axis of the run's first ``epochs`` epochs."""
        steps = facts.steps_per_epoch
        end = epochs * steps
        every_epoch = max(1, round(tick_step(epochs, 10)))
        every_step = max(1, round(tick_step(end, 8)))
        return cls(
            end=end,
            steps_per_epoch=steps,
            bands=_bands(epochs),
            epoch_ticks=[
                (_percent(epoch, epochs), str(epoch)) for epoch in range(every_epoch, epochs + 1, every_epoch)
            ],
            iteration_ticks=[(_percent(step, end), f"{step:,}") for step in range(every_step, end + 1, every_step)],
            drops=[
                LearningRateDrop(_percent(epoch, epochs), f"lr {rate:.4g}", late=epoch > 0.8 * epochs)
                for epoch, rate in facts.lr_drops
                if epoch < epochs
            ],
        )


@dataclass(frozen=True)
class Plot:
    """One quantity of the run.

    Attributes:
        quantity: ``accuracy`` or ``loss``.
        unit: ``%`` or none.
        label: a description of the plot for screen readers.
        top: upper end of the value axis, in the unit.
        grid: heights in percent, and the numbers beside them.
        raw: path of the training curve as measured.
        smooth: path of the smoothed training curve.
        validation: path of the validation curve.
        dots: path of the dots on it.
    """

    quantity: str
    unit: str
    label: str
    top: str
    grid: Sequence[tuple[str, str]]
    raw: str
    smooth: str
    validation: str
    dots: str

    @classmethod
    def of(cls, quantity: str, unit: str, curves: Curves, top: float, end: int) -> "Plot":
        """The curves over ``end`` iterations, from 0 to ``top``."""
        scale = 100 if unit == "%" else 1
        lines = (curves.smooth, curves.validation)
        last = [number_text(line[-1][1] * scale if line else None, ".4g") for line in lines]
        return cls(
            quantity=quantity,
            unit=unit,
            label=f"{quantity} over {end:,} iterations: training {last[0]}{unit}, validation {last[1]}{unit} at last",
            top=f"{top * scale:g}",
            grid=_grid(top * scale),
            raw=line_path(curves.raw, end, top),
            smooth=line_path(curves.smooth, end, top),
            validation=line_path(curves.validation, end, top),
            dots=dots_path(curves.validation, end, top),
        )


def _percent(place: float, end: float) -> str:
    return f"{100 * place / end:.2f}%"


def _bands(epochs: int) -> str:
    """Path of every second epoch's band; a band is several epochs where there are many."""
    width = math.ceil(tick_step(epochs, MAX_BANDS))
    unit = PLANE / epochs
    spans = [(start * unit, min(width, epochs - start) * unit) for start in range(width, epochs, 2 * width)]
    return "".join(f"M{left:.1f},0h{span:.1f}v{PLANE}h-{span:.1f}z" for left, span in spans)


def _grid(top: float) -> list[tuple[str, str]]:
    """Heights of horizontal lines from 0 to ``top``, and the numbers beside them."""
    step = tick_step(top, 5)
    values = [number * step for number in range(round(top / step) + 1)]
    return [(f"{100 - 100 * value / top:.2f}%", f"{value:g}") for value in values]


def line_path(points: Sequence[Point], end: float, top: float) -> str:
    """SVG path of a line through ``points`` on the plane, y downwards; a value that is not finite leaves a gap."""
    parts: list[str] = []
    pen_down = False
    for step, value in points:
        if math.isfinite(value):
            parts.append((" " if pen_down else "M") + _place(step, value, end, top))
        pen_down = math.isfinite(value)
    return "".join(parts)


def dots_path(points: Sequence[Point], end: float, top: float) -> str:
    """SVG path of lines without length. Round caps draw them as dots, which stretching does not deform."""
    return "".join(f"M{_place(step, value, end, top)}h0" for step, value in points if math.isfinite(value))


def _place(step: float, value: float, end: float, top: float) -> str:
    height = min(value / top, 1000)  # far above the plot; browsers give up on numbers beyond float32
    return f"{PLANE * step / end:.1f},{PLANE - PLANE * height:.1f}"
