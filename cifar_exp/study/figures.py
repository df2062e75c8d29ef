"""The figures of a study: speedup by device count, two sweeps compared."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_exp.display.figure_style import SERIES_COLOURS, SOFT, empty_figure, save_png, tidy_axes
from cifar_exp.study.group import Group
from cifar_exp.study.intervals import Interval
from cifar_exp.study.speedup import SpeedupRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BOTH_LAWS = 2  # up to so many groups both laws are drawn; with more groups, only the law for the group's scaling
Pair = tuple[str, Group, Group, Mapping[int, tuple[float, Interval | None]]]
"""A group's name, its figures in the first and second sweep, and the throughput ratios by device count."""


def draw_speedup(groups: Mapping[str, Group], path: Path, simulated: bool) -> None:
    """Speedup, efficiency, training time and test accuracy over the device count as a PNG at ``path``.

    Args:
        groups: by the group's name (empty if there is one group).
        path: where to write.
        simulated: whether the devices were ranks on one CPU; the title says so.
    """
    save_png(speedup_figure(groups, simulated), path)


def draw_comparison(names: tuple[str, str], pairs: Sequence[Pair], path: Path, simulated: bool) -> None:
    """Two sweeps over the device count as a PNG at ``path``; see :func:`comparison_figure`."""
    save_png(comparison_figure(names, pairs, simulated), path)


def speedup_figure(groups: Mapping[str, Group], simulated: bool) -> "Figure":
    """Four panels: speedup with the ideal line and the fitted laws, efficiency, training time, accuracy.

    Each group has a colour. Error bars are 95 % intervals.
    """
    figure = empty_figure(height=8.6)
    (speedup, efficiency), (time, accuracy) = figure.subplots(2, 2)
    counts = sorted({row.devices for group in groups.values() for row in group.rows})
    _draw_ideal(speedup, [group.rows for group in groups.values()])
    efficiency.axhline(100, linestyle="--", color=SOFT, linewidth=1.3)
    for place, (name, group) in enumerate(groups.items()):
        colour = _colour(place)
        _draw_laws(speedup, group, name, colour, both=len(groups) <= BOTH_LAWS)
        _draw_points(speedup, group.rows, "speedup", 1, colour, name or "measured")
        _label_speedups(speedup, group.rows, colour)
        _draw_points(efficiency, group.rows, "efficiency", 100, colour, name)
        _draw_points(accuracy, group.rows, "test_accuracy", 100, colour, name)
    _scale_by_devices(speedup, counts)
    _draw_times(time, {name: group.rows for name, group in groups.items()}, counts)
    for axes in (efficiency, accuracy):
        _mark_devices(axes, counts)
    xlabel = "devices (CPU-simulated)" if simulated else "devices"
    for axes, title, ylabel in (
        (speedup, "Images/s relative to the smallest count", "speedup"),
        (efficiency, "Speedup / ideal speedup", "efficiency (%)"),
        (time, "Training time", time.get_ylabel()),
        (accuracy, "Test accuracy", "test accuracy (%)"),
    ):
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    speedup.legend(loc="upper left", frameon=False, fontsize=8)
    figure.suptitle("Speedup by device count" + (", CPU-simulated" if simulated else ""), fontweight="bold")
    return figure


def comparison_figure(names: tuple[str, str], pairs: Sequence[Pair], simulated: bool) -> "Figure":
    """Two panels: images/s of both sweeps, and the ratio second / first, with 95 % intervals.

    Args:
        names: of the two sweeps, for example ``A: before``.
        pairs: the common groups.
        simulated: whether the devices of one sweep were ranks on one CPU.
    """
    figure = empty_figure(height=4.6)
    rates, ratios = figure.subplots(1, 2)
    counts = sorted({row.devices for _, *both, _ in pairs for group in both for row in group.rows})
    ratios.axhline(1, linestyle="--", color=SOFT, linewidth=1.3)
    for place, (name, first, second, found) in enumerate(pairs):
        colour = _colour(place)
        for sweep, group, line in ((names[0], first, "--"), (names[1], second, "-")):
            _draw_points(rates, group.rows, "images_per_second", 1, colour, f"{sweep} {name}".rstrip(), line)
        devices, values = list(found), [ratio for ratio, _ in found.values()]
        ratios.plot(devices, values, "o", color=colour, label=name)
        _draw_bars(ratios, devices, values, [interval for _, interval in found.values()], colour)
    _scale_by_devices(rates, counts)
    _mark_devices(ratios, counts)
    xlabel = "devices (CPU-simulated)" if simulated else "devices"
    rates.set(title="Images/s", xlabel=xlabel)
    before, after = (name.partition(":")[0] for name in names)
    ratios.set(title=f"Images/s: {after} / {before}", xlabel=xlabel)
    rates.legend(loc="upper left", frameon=False, fontsize=8)
    figure.suptitle("Two sweeps" + (", CPU-simulated" if simulated else ""), fontweight="bold")
    return figure


def _draw_ideal(axes: "Axes", groups: Sequence[Sequence[SpeedupRow]]) -> None:
    """Ideal linear speedup: one dashed line for each baseline device count."""
    largest = max(rows[-1].devices for rows in groups)
    for place, first in enumerate(sorted({rows[0].devices for rows in groups})):
        label = None if place else "ideal"
        axes.plot([first, largest], [1, largest / first], "--", color=SOFT, linewidth=1.3, label=label)


def _draw_laws(axes: "Axes", group: Group, name: str, colour: str, both: bool) -> None:
    """The fitted laws as thin lines over the measured range."""
    first, last = group.rows[0].devices, group.rows[-1].devices
    steps = [first * (last / first) ** (step / 40) for step in range(41)]
    for fit, line in list(zip(group.fits, ("-.", ":"), strict=True))[: 2 if both else 1]:
        label = f"{fit.law}, {fit.serial_fraction:.1%} serial" + (f" ({name})" if name else "")
        speedups = [fit.speedup(devices, over=first) for devices in steps]
        axes.plot(steps, speedups, line, color=colour, linewidth=1, alpha=0.8, label=label)


def _draw_points(
    axes: "Axes", rows: Sequence[SpeedupRow], figure: str, scale: float, colour: str, label: str, line: str = "-"
) -> None:
    """Draw one quantity of the rows, times ``scale``, as connected dots with error bars."""
    devices, values = [row.devices for row in rows], [getattr(row, figure) * scale for row in rows]
    axes.plot(devices, values, f"o{line}", color=colour, linewidth=2, markersize=5, label=label)
    intervals = [row.intervals.get(figure) for row in rows]
    scaled = [interval and interval.mapped(lambda value: value * scale) for interval in intervals]
    _draw_bars(axes, devices, values, scaled, colour)


def _draw_bars(
    axes: "Axes", devices: Sequence[int], values: Sequence[float], intervals: Sequence[Interval | None], colour: str
) -> None:
    """Draw intervals as error bars."""
    known = [(*point, interval) for *point, interval in zip(devices, values, intervals, strict=True) if interval]
    if known:
        across, up, _ = zip(*known, strict=True)
        axes.errorbar(across, up, _reaches(known), fmt="none", ecolor=colour, capsize=4, elinewidth=1.4)


def _reaches(points: Sequence[Sequence[Any]]) -> list[list[float]]:
    """Distances of the intervals' ends from their values. Each point's last two items are value and interval."""
    return [[value - interval.low for *_, value, interval in points], [i.high - value for *_, value, i in points]]


def _label_speedups(axes: "Axes", rows: Sequence[SpeedupRow], colour: str) -> None:
    """Label the speedups below and to the right of their dots, where a rising line leaves room."""
    from matplotlib.patheffects import withStroke

    for row in rows[1:]:
        axes.annotate(
            f"{row.speedup:.2f}",
            (row.devices, row.speedup),
            xytext=(6, -12),
            textcoords="offset points",
            color=colour,
            path_effects=[withStroke(linewidth=3, foreground="white")],  # readable on top of other groups' lines
        )


def _colour(place: int) -> str:
    return SERIES_COLOURS[place % len(SERIES_COLOURS)]


def _scale_by_devices(axes: "Axes", counts: Sequence[int]) -> None:
    """Ticks at the measured counts; logarithmic axes where all counts are powers of two."""
    if _all_doublings(counts):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    _mark_devices(axes, counts)


def _mark_devices(axes: "Axes", counts: Sequence[int]) -> None:
    """Ticks at the measured counts; a logarithmic x axis where all counts are powers of two."""
    if _all_doublings(counts):
        axes.set_xscale("log", base=2)
    axes.set_xticks(counts, labels=[str(count) for count in counts], minor=False)
    axes.margins(0.14)
    tidy_axes(axes)


def _all_doublings(counts: Sequence[int]) -> bool:
    return all(count & (count - 1) == 0 for count in counts)


def _draw_times(axes: "Axes", groups: Mapping[str, Sequence[SpeedupRow]], counts: Sequence[int]) -> None:
    """Draw training times as grouped bars with intervals and labels."""
    longest = max(row.train_seconds for rows in groups.values() for row in rows)
    unit, seconds = ("min", 60) if longest >= 120 else ("s", 1)
    width = 0.75 / len(groups)
    rotation = 90 if len(groups) * len(counts) > 8 else 0  # more labels than that would overlap
    for place, (name, rows) in enumerate(groups.items()):
        shift = (place - (len(groups) - 1) / 2) * width
        points = [(row.train_seconds, row.intervals.get("train_seconds")) for row in rows]
        known = [(value / seconds, (i or Interval(value, value)).mapped(lambda x: x / seconds)) for value, i in points]
        bars = axes.bar(
            [counts.index(row.devices) + shift for row in rows],
            [value for value, _ in known],
            0.92 * width,
            yerr=_reaches(known) if any(interval for _, interval in points) else None,
            capsize=4,
            color=_colour(place),
            label=name,
        )
        axes.bar_label(bars, fmt=lambda time: f"{_short(time)} {unit}", padding=3, fontsize=9, rotation=rotation)
    axes.set_xticks(range(len(counts)), labels=[str(count) for count in counts])
    axes.set_ylabel(f"training time ({unit})")
    axes.margins(y=0.25 if rotation else 0.1)
    tidy_axes(axes)
    axes.grid(visible=False, axis="x")


def _short(value: float) -> str:
    """At least two significant digits: ``0.75``, ``2.6``, ``142``."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"
