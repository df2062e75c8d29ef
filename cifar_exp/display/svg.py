"""Curves as SVG paths with axes and grid."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cifar_exp.display.curves import Curves, Point, RunFacts, axis_epochs, loss_top, tick_step

PLANE = 1000  # units of the curves' plane, each way
MAX_BANDS = 40  # epoch bands; narrower ones flicker
ABSENT = "\u2013"  # a dash


def number_text(value: float | None, form: str) -> str:
    """The formatted value; a dash where it is unknown or not finite."""
    return ABSENT if value is None or not math.isfinite(value) else format(value, form)


def plots_html(accuracy: Curves, loss: Curves, step: int, facts: RunFacts) -> str:
    """Both plots over one iteration axis, epochs above, iterations below."""
    epochs = axis_epochs(step, facts)
    axis = _Axis(epochs * facts.steps_per_epoch, epochs, facts)
    waiting = "" if step else '<p class="waiting">The curves begin with the first iterations.</p>'
    # A little more than the plane may be drawn on, or else the dots at its edges were halves.
    return f"""<section class="plots" data-end="{axis.end}" data-epoch="{facts.steps_per_epoch}">
<svg width="0" height="0" aria-hidden="true"><clipPath id="room"><rect x="-12" y="-12" width="{PLANE + 24}"
 height="{PLANE + 24}"/></clipPath></svg>
{_plot("accuracy", "%", accuracy, 1.0, axis)}
{_plot("loss", "", loss, loss_top(loss), axis)}
{waiting}<div class="tip" hidden></div>
</section>"""


@dataclass(frozen=True)
class _Axis:
    """The iteration axis that both plots share: iterations and epochs it spans, and the run."""

    end: int
    epochs: int
    facts: RunFacts

    def percent(self, step: float) -> str:
        return f"{100 * step / self.end:.2f}%"

    def bands(self) -> str:
        """Path of every second epoch's band."""
        width = math.ceil(tick_step(self.epochs, MAX_BANDS))
        unit = PLANE / self.epochs
        starts = range(width, self.epochs, 2 * width)
        spans = [(start * unit, min(width, self.epochs - start) * unit) for start in starts]
        return "".join(f"M{left:.1f},0h{span:.1f}v{PLANE}h-{span:.1f}z" for left, span in spans)

    def epoch_ticks(self) -> str:
        every = max(1, round(tick_step(self.epochs, 10)))
        return '<text x="-8" y="-13" class="end">epoch</text>' + "".join(
            f'<text x="{self.percent(epoch * self.facts.steps_per_epoch)}" y="-13" class="middle">{epoch}</text>'
            for epoch in range(every, self.epochs + 1, every)
        )

    def iteration_ticks(self) -> str:
        every = max(1, round(tick_step(self.end, 8)))
        ticks = range(0, self.end + 1, every)
        return '<text x="-8" y="100%" dy="20" class="end">iteration</text>' + "".join(
            f'<text x="{self.percent(tick)}" y="100%" dy="20" class="middle">{tick:,}</text>' for tick in ticks[1:]
        )

    def drops(self) -> str:
        """Lines where the learning rate changes."""
        places = [self.percent(epochs * self.facts.steps_per_epoch) for epochs, _ in self._drops()]
        return "".join(f'<line class="drop" x1="{x}" x2="{x}" y2="100%"/>' for x in places)

    def drop_labels(self) -> str:
        """The new rates beside those lines; beyond four fifths to their left, so as not to leave the plot."""
        sides = ('dx="6" class="drop"', 'dx="-6" class="drop end"')
        return "".join(
            f'<text x="{self.percent(epochs * self.facts.steps_per_epoch)}" y="100%" dy="-9" '
            f"{sides[epochs > 0.8 * self.epochs]}>lr {rate:.4g}</text>"
            for epochs, rate in self._drops()
        )

    def _drops(self) -> list[tuple[int, float]]:
        return [(epochs, rate) for epochs, rate in self.facts.lr_drops if epochs < self.epochs]


def _plot(quantity: str, unit: str, curves: Curves, top: float, axis: _Axis) -> str:
    """One plot as a figure: caption with legend, grid, bands, curves."""
    scale = 100 if unit == "%" else 1
    last = [number_text(line[-1][1] * scale if line else None, ".4g") for line in (curves.smooth, curves.validation)]
    label = f"{quantity} over {axis.end:,} iterations: training {last[0]}{unit}, validation {last[1]}{unit} at last"
    marks = axis.epoch_ticks() + axis.drop_labels() if quantity == "accuracy" else axis.iteration_ticks()
    hover = f'data-top="{top * scale:g}" data-unit="{unit}"'
    return f"""<figure class="{quantity}">
<figcaption><b>{quantity.capitalize()}{f" ({unit})" if unit else ""}</b><span class="key raw">training</span>
<span class="key smooth">training, smoothed</span><span class="key validation">validation</span></figcaption>
<svg class="frame" role="img" aria-label="{label}">
<svg viewBox="0 0 {PLANE} {PLANE}" preserveAspectRatio="none" width="100%" height="100%">
<rect class="ground" width="{PLANE}" height="{PLANE}"/><path class="bands" d="{axis.bands()}"/></svg>
{_grid(top * scale)}{axis.drops()}{marks}
<svg class="curves" viewBox="0 0 {PLANE} {PLANE}" preserveAspectRatio="none" width="100%" height="100%">
<path class="raw" d="{line_path(curves.raw, axis.end, top)}"/>
<path class="smooth" data-name="training {quantity}" {hover} d="{line_path(curves.smooth, axis.end, top)}"/>
<path class="validation" d="{line_path(curves.validation, axis.end, top)}"/>
<path class="dots" data-name="validation {quantity}" {hover} d="{dots_path(curves.validation, axis.end, top)}"/></svg>
<line class="cross" y2="100%" visibility="hidden"/>
</svg>
</figure>"""


def _grid(top: float) -> str:
    """Horizontal lines and the numbers beside them, from 0 to ``top``."""
    step = tick_step(top, 5)
    heights = [(number * step, f"{100 - 100 * number * step / top:.2f}%") for number in range(round(top / step) + 1)]
    return "".join(
        f'<line class="grid" x2="100%" y1="{y}" y2="{y}"/><text x="-8" y="{y}" dy="4" class="end">{value:g}</text>'
        for value, y in heights
    )


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
    """SVG path of lines without length, which round caps make into dots that no stretching deforms."""
    return "".join(f"M{_place(step, value, end, top)}h0" for step, value in points if math.isfinite(value))


def _place(step: float, value: float, end: float, top: float) -> str:
    height = min(value / top, 1000)  # far above the plot; browsers give up on numbers beyond float32
    return f"{PLANE * step / end:.1f},{PLANE - PLANE * height:.1f}"
