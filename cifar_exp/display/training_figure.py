"""The training figure of a run as a PNG file.

matplotlib takes a second to import, so it is imported where a figure is drawn. pyplot is not used: it has global state.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_exp.display.curves import Curves, PageFacts, Point, axis_epochs, loss_top, tick_step
from cifar_exp.display.figure_style import BAND, BLUE, INK, PURPLE, SOFT, VERMILION, empty_figure, save_png, tidy_axes
from cifar_exp.records.journal import Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_training(entries: Sequence[Entry], facts: PageFacts, path: Path) -> None:
    """Loss and accuracy over the iterations as a PNG at ``path``. ``entries``: the run's journal."""
    save_png(training_figure(entries, facts), path)


def training_figure(entries: Sequence[Entry], facts: PageFacts) -> "Figure":
    """Two plots over one iteration axis, as on the run's page."""
    figure = empty_figure(height=6.4)
    upper, lower = figure.subplots(2, 1, sharex=True)
    step = entries[-1].step if entries else 0
    epochs = axis_epochs(step, facts)
    accuracy = Curves.of(entries, "accuracy", facts.steps_per_epoch)
    loss = Curves.of(entries, "loss", facts.steps_per_epoch)
    _draw_curves(upper, accuracy, 100, BLUE)
    _draw_curves(lower, loss, 1, VERMILION)
    for axes in (upper, lower):
        _shade_epochs(axes, epochs, facts.steps_per_epoch)
        for drop, _ in facts.lr_drops:
            axes.axvline(drop * facts.steps_per_epoch, color=PURPLE, linestyle=":", linewidth=1.3)
        axes.legend(loc="best", frameon=False, fontsize=9)
    _label_drops(upper, epochs, facts)
    upper.set(ylabel="accuracy (%)", ylim=(0, 100), xlim=(0, epochs * facts.steps_per_epoch))
    lower.set(ylabel="loss", ylim=(0, loss_top(loss)), xlabel="iteration")
    lower.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ending = "" if facts.status == "finished" else f" ({facts.status})"
    figure.suptitle(facts.title + ending, fontweight="bold", parse_math=False)
    return figure


def _draw_curves(axes: "Axes", curves: Curves, scale: float, colour: str) -> None:
    """Training raw and smoothed, validation as joined dots; values times ``scale``."""

    def plot(points: Sequence[Point], label: str, **look: Any) -> None:
        axes.plot([step for step, _ in points], [value * scale for _, value in points], label=label, **look)

    plot(curves.raw, "training", color=colour, alpha=0.3, linewidth=0.8)
    plot(curves.smooth, "training, smoothed", color=colour, linewidth=2)
    plot(curves.validation, "validation", color=INK, linewidth=1, linestyle="--", marker="o", markersize=3.5)
    tidy_axes(axes)


def _shade_epochs(axes: "Axes", epochs: int, steps_per_epoch: int) -> None:
    """Every second epoch grey; several epochs a band where there are many."""
    width = math.ceil(tick_step(epochs, 40))
    for start in range(width, epochs, 2 * width):
        end = min(start + width, epochs)
        axes.axvspan(start * steps_per_epoch, end * steps_per_epoch, color=BAND, linewidth=0, zorder=0)


def _label_drops(axes: "Axes", epochs: int, facts: PageFacts) -> None:
    """The epoch count on an axis above, and the new learning rates at their lines."""
    steps = facts.steps_per_epoch
    every = max(1, round(tick_step(epochs, 10)))
    marks = range(every, epochs + 1, every)
    above = axes.secondary_xaxis("top")
    above.set_xticks([epoch * steps for epoch in marks], labels=[str(epoch) for epoch in marks])
    above.set_xlabel("epoch", color=SOFT)
    above.tick_params(colors=SOFT, length=0)
    above.spines["top"].set_visible(False)
    for drop, rate in facts.lr_drops:
        if drop < epochs:
            late = drop > 0.8 * epochs  # to the right of the line the text would leave the plot
            axes.annotate(
                f"lr {rate:.4g}",
                (drop * steps, 0),
                xytext=(-5 if late else 5, 6),
                textcoords="offset points",
                horizontalalignment="right" if late else "left",
                color=PURPLE,
            )
