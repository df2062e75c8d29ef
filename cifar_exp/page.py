"""The run's live page: one HTML file that needs nothing else, from the journal alone.

It is drawn in the parent while the ranks train, so it has to be cheap: curves are thinned before they become SVG, and
no plotting library is imported. The curves are drawn on a plane of ``PLANE`` x ``PLANE`` units that the browser
stretches to the window; texts are placed in percent beside it and keep their size.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

from cifar_exp.errors import FREE_SPACE, storage_errors
from cifar_exp.journal import Entry

FILE_NAME = "progress.html"
PLANE = 1000  # units of the curves' plane, each way
MAX_POINTS = 600  # a curve; more than the pixels they would share tells nothing
MAX_BANDS = 40  # epoch bands; narrower ones flicker
SMOOTHING_EPOCHS = 0.25  # time constant of the smoothed curves
LIVE = ("starting", "running")
ABSENT = "\u2013"  # a dash

Point = tuple[float, float]  # (iteration, value)


@dataclass(frozen=True)
class RunFacts:
    """What page and figure say about a run beside the journal.

    Attributes:
        title: the run in a few words, as in ``convnet 32x4 on CIFAR-10``.
        status: ``starting``, ``running``, ``finished``, ``failed`` or ``stopped``.
        epochs: passes planned.
        steps_per_epoch: iterations each.
        lr_drops: (epochs after which the learning rate changes, the new rate).
        details: names and texts of the table beside the plot.
    """

    title: str
    status: str
    epochs: int
    steps_per_epoch: int
    lr_drops: Sequence[tuple[int, float]]
    details: Mapping[str, str]


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


def write_progress_page(run_dir: Path, entries: Sequence[Entry], facts: RunFacts, elapsed: float) -> Path:
    """Put ``progress.html`` into the run's folder; a reader finds the old page or the new one, never a part.

    Args:
        run_dir: the run's folder.
        entries: the journal so far.
        facts: what else there is to say.
        elapsed: seconds since the run began.

    Returns:
        The page's path.

    Raises:
        StorageError: where the file system refuses.
    """
    page = run_dir / FILE_NAME
    temporary = page.with_suffix(".tmp")
    text = page_html(entries, facts, elapsed)
    try:
        with storage_errors(page, FREE_SPACE):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(page)
    finally:
        with suppress(OSError):  # of the same cause
            temporary.unlink(missing_ok=True)
    return page


def page_html(entries: Sequence[Entry], facts: RunFacts, elapsed: float) -> str:
    """The whole page. It loads itself again every two seconds until the run has ended."""
    latest: dict[str, float] = {}
    for entry in entries:
        latest.update(entry.metrics)
    step = entries[-1].step if entries else 0
    done = step / (facts.epochs * facts.steps_per_epoch)
    accuracy = Curves.of(entries, "accuracy", facts.steps_per_epoch)
    loss = Curves.of(entries, "loss", facts.steps_per_epoch)
    live = facts.status in LIVE
    tiles = _tiles(latest, accuracy, facts, elapsed, seconds_left(entries, facts) if live else None)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{done:.0%} {escape(facts.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(facts.title)}</h1><span class="badge {escape(facts.status)}">{escape(facts.status)}</span>
</header>
{_progress_bar(step, done, facts)}
<dl class="tiles">{"".join(_tile(name, text) for name, text in tiles.items())}</dl>
<main>
{_plots(accuracy, loss, step, facts)}
<aside>
{_time_split(latest)}
{_details(facts.details)}
</aside>
</main>
<footer>Drawn {time.strftime("%Y-%m-%d %H:%M:%S")} from metrics.jsonl in this folder.</footer>
<script>{HOVER_SCRIPT}{RELOAD_SCRIPT if live else ""}</script>
</body>
</html>
"""


def series(entries: Sequence[Entry], name: str) -> list[Point]:
    """One metric over the iterations."""
    return [(entry.step, entry.metrics[name]) for entry in entries if name in entry.metrics]


def smoothed(points: Sequence[Point], steps: float) -> list[Point]:
    """Exponential average over about ``steps`` iterations. A value that is not finite stays, and is not averaged."""
    result: list[Point] = []
    total = weight = previous = 0.0
    for step, value in points:
        if math.isfinite(value):
            decay = math.exp((previous - step) / steps)
            total = total * decay + value
            weight = weight * decay + 1  # the weights' sum: the first values are not drawn towards zero
            previous, value = step, total / weight
        result.append((step, value))
    return result


def thinned(points: Sequence[Point], limit: int = MAX_POINTS) -> Sequence[Point]:
    """At most ``limit`` of the points: the first, the last, and of each stretch between them the lowest and highest.

    A stretch with values that are not finite keeps one of those, so that the gap stays, and its highest.
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
    """At most ``limit`` means of equally many points in a row, each at its last one's iteration."""
    if len(points) <= limit:
        return points
    values = [value for _, value in points]
    return [
        (points[end - 1][0], sum(values[start:end]) / (end - start)) for start, end in _stretches(0, len(points), limit)
    ]


def _stretches(start: int, end: int, count: int) -> Iterator[tuple[int, int]]:
    """``count`` ranges of about equal length that make up ``start`` to ``end``."""
    return pairwise(start + (end - start) * number // count for number in range(count + 1))


def axis_epochs(step: int, facts: RunFacts) -> int:
    """How many epochs the plot shows: all, or half of them, or a quarter, ..., as long as what is done fits.

    So the curves fill at least half of the plot, and the scale changes a few times in a run, not at every look.
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
    """The upper end of the loss axis: the highest loss, but a burst far above nine tenths of the others is cut."""
    values = sorted(value for _, value in (*loss.raw, *loss.validation) if math.isfinite(value))
    if not values or values[-1] <= 0:
        return 1.0
    highest = min(values[-1], 5 * values[math.ceil(0.9 * (len(values) - 1))])
    step = tick_step(highest, 5)
    return step * math.ceil(highest / step)


def seconds_left(entries: Sequence[Entry], facts: RunFacts) -> float | None:
    """Estimated from the pace since the first entry; None before there is a pace."""
    if not entries or entries[-1].step <= entries[0].step:
        return None
    first, last = entries[0], entries[-1]
    pace = (last.time - first.time) / (last.step - first.step)
    return pace * (facts.epochs * facts.steps_per_epoch - last.step)


def duration(seconds: float | None) -> str:
    """As in ``4.2 s``, ``42 s``, ``3 min 05 s``, ``1 h 02 min``."""
    if seconds is None or not math.isfinite(seconds):
        return ABSENT
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _tiles(
    latest: Mapping[str, float], accuracy: Curves, facts: RunFacts, elapsed: float, left: float | None
) -> dict[str, str]:
    rate = latest.get("steady_images_per_second", latest.get("step/images_per_second"))
    tiles = {
        "elapsed": duration(elapsed),
        "time left": duration(left),
        "images/s": _number(rate, ",.0f"),
        "learning rate": _number(latest.get("lr"), ".4g"),
        "training accuracy": _number(accuracy.smooth[-1][1] if accuracy.smooth else None, ".1%"),
        "validation accuracy": _number(latest.get("val/accuracy"), ".1%"),
        "test accuracy": _number(latest.get("test/accuracy"), ".2%"),
    }
    if facts.status not in LIVE:
        del tiles["time left"]
    if "test/accuracy" not in latest:
        del tiles["test accuracy"]
    return tiles


def _tile(name: str, text: str) -> str:
    return f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>"


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None or not math.isfinite(value) else format(value, form)


def _progress_bar(step: int, done: float, facts: RunFacts) -> str:
    steps = facts.epochs * facts.steps_per_epoch
    epochs = step // facts.steps_per_epoch
    return f"""<div class="progress {escape(facts.status)}" role="progressbar" aria-label="epochs done"
 aria-valuemin="0" aria-valuemax="{facts.epochs}" aria-valuenow="{epochs}"><i style="width:{done:.2%}"></i></div>
<p class="progress-text"><span>{epochs} of {facts.epochs} epochs done</span>
<span>{step:,} of {steps:,} iterations</span></p>"""


def _plots(accuracy: Curves, loss: Curves, step: int, facts: RunFacts) -> str:
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
    last = [_number(line[-1][1] * scale if line else None, ".4g") for line in (curves.smooth, curves.validation)]
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


def _time_split(latest: Mapping[str, float]) -> str:
    """A bar of where the time went, with names, seconds and shares; nothing before that is known."""
    prefix = "time_split/"
    seconds = {
        name.removeprefix(prefix): value
        for name, value in latest.items()
        if name.startswith(prefix) and math.isfinite(value) and value > 0
    }
    total = sum(seconds.values())
    if not total:
        return ""
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    bar = "".join(
        f'<i class="part{place % 9}" style="flex-grow:{value / total:.4f}" title="{escape(name)}"></i>'
        for place, (name, value) in enumerate(ordered)
    )
    rows = "".join(
        f'<tr><th><i class="part{place % 9}"></i>{escape(name.capitalize())}</th><td>{duration(value)}</td>'
        f"<td>{value / total:.1%}</td></tr>"
        for place, (name, value) in enumerate(ordered)
    )
    return f"""<section><h2>Where the time went</h2>
<div class="split" role="img" aria-label="shares of {duration(total)}, listed below">{bar}</div>
<table class="shares">{rows}</table></section>"""


def _details(details: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in details.items())
    return f"<section><h2>Details</h2><table>{rows}</table></section>"


# Colours: Okabe and Ito's, told apart by the colour-blind (https://jfly.uni-koeln.de/color/), lighter ones on dark.
STYLE = """
:root { color-scheme: light dark; --page: #f5f6f8; --card: #fff; --ink: #1b1f24; --soft: #59636e; --edge: #dfe3e8;
  --band: #f0f2f6; --accuracy: #0072b2; --loss: #d55e00; --drop: #8a3f74; --good: #007a55; --bad: #b3261e;
  --warn: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --page: #0e1116; --card: #171b22; --ink: #e8ebef; --soft: #9da7b3;
  --edge: #2b323c; --band: #1e242d; --accuracy: #56b4e9; --loss: #f08c46; --drop: #dd9ac4; --good: #3fc796;
  --bad: #ff8a80; --warn: #e6b450; } }
* { box-sizing: border-box; margin: 0; }
body { max-width: 1320px; margin: auto; padding: 20px 24px 12px; background: var(--page); color: var(--ink);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
header { display: flex; align-items: center; gap: 14px; }
h1 { font-size: 22px; font-weight: 650; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 14px; font-weight: 650; margin-bottom: 8px; }
.badge { padding: 2px 11px; border: 1.5px solid; border-radius: 99px; font-size: 13px; font-weight: 600;
  color: var(--soft); }
.badge.running { color: var(--accuracy); } .badge.finished { color: var(--good); }
.badge.failed { color: var(--bad); } .badge.stopped { color: var(--warn); }
.progress { height: 8px; margin: 14px 0 4px; border-radius: 4px; background: var(--edge); overflow: hidden; }
.progress i { display: block; height: 100%; border-radius: 4px; background: var(--accuracy); }
.progress.finished i { background: var(--good); } .progress.failed i { background: var(--bad); }
.progress.stopped i { background: var(--warn); }
.progress-text { display: flex; justify-content: space-between; color: var(--soft); font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(142px, 1fr)); gap: 10px; margin: 12px 0; }
.tiles div, section { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; }
.tiles div { padding: 8px 13px 9px; }
dt::first-letter, th::first-letter { text-transform: uppercase; }
.tiles dt { color: var(--soft); font-size: 12.5px; white-space: nowrap; }
.tiles dd { font-size: 20px; font-weight: 600; white-space: nowrap; font-variant-numeric: tabular-nums; }
main { display: grid; grid-template-columns: minmax(0, 1fr) 320px; gap: 12px; align-items: start; }
aside { display: grid; gap: 12px; }
section { padding: 14px 16px; }
.plots { position: relative; padding: 14px 26px 36px 70px; }
.plots > svg { position: absolute; }
.curves { overflow: visible; } .curves path { clip-path: url(#room); }
figure + figure { margin-top: 14px; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 18px; margin: 0 0 30px -54px; }
figcaption b { margin-right: auto; font-weight: 650; }
.loss figcaption { margin-bottom: 10px; }
.accuracy { --line: var(--accuracy); } .loss { --line: var(--loss); }
.key { color: var(--soft); font-size: 12.5px; }
.key::before { content: ""; display: inline-block; width: 22px; margin-right: 6px; vertical-align: middle;
  border-top: 2.5px solid var(--line); }
.key.raw::before { opacity: .35; } .key.validation::before { border-top: 2.5px dashed var(--ink); }
.frame { display: block; width: 100%; height: clamp(190px, 27vh, 340px); overflow: visible; }
.frame text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.frame .middle { text-anchor: middle; } .frame .end { text-anchor: end; }
.frame text.drop { fill: var(--drop); font-weight: 600; paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
path, line { fill: none; vector-effect: non-scaling-stroke; stroke-linecap: round; stroke-linejoin: round; }
.ground { fill: var(--card); } .bands { fill: var(--band); }
.grid { stroke: var(--edge); } line.drop { stroke: var(--drop); stroke-width: 1.5; stroke-dasharray: 2 4; }
path.raw { stroke: var(--line); opacity: .3; } path.smooth { stroke: var(--line); stroke-width: 2.2; }
path.validation { stroke: var(--ink); stroke-width: 1.3; stroke-dasharray: 3 4; opacity: .75; }
.dots { stroke: var(--ink); stroke-width: 5.5; }
.cross { stroke: var(--soft); }
.tip { position: absolute; top: 52px; padding: 7px 11px; border: 1px solid var(--edge); border-radius: 8px;
  background: var(--card); box-shadow: 0 3px 14px #0003; font-size: 12.5px; white-space: pre; pointer-events: none;
  font-variant-numeric: tabular-nums; }
.waiting { position: absolute; inset: 27% 0 auto; text-align: center; color: var(--soft); }
table { width: 100%; border-collapse: collapse; font-size: 13px; }
th { padding: 5px 12px 5px 0; text-align: left; vertical-align: top; font-weight: 400; color: var(--soft);
  white-space: nowrap; }
td { padding: 5px 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
tr + tr > * { border-top: 1px solid var(--edge); }
.shares td { padding-left: 12px; text-align: right; white-space: nowrap; }
.split { display: flex; gap: 2px; height: 18px; margin-bottom: 6px; border-radius: 5px; overflow: hidden; }
.split i { flex-basis: 0; min-width: 1px; }
.shares i { display: inline-block; width: 10px; height: 10px; margin-right: 8px; border-radius: 3px; }
.part0 { background: #0072b2; } .part1 { background: #e69f00; } .part2 { background: #009e73; }
.part3 { background: #cc79a7; } .part4 { background: #56b4e9; } .part5 { background: #d55e00; }
.part6 { background: #b8ac1f; } .part7 { background: #7d8590; } .part8 { background: #6f5bb0; }
footer { margin-top: 10px; color: var(--soft); font-size: 12px; }
@media (max-width: 900px) { main { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 640px) { body { padding: 14px 12px; } }
"""

# The values under the pointer are read back from the paths, which hold all that is drawn.
HOVER_SCRIPT = """
const plots = document.querySelector('.plots'), tip = plots.querySelector('.tip');
const crosses = plots.querySelectorAll('.cross'), {end, epoch} = plots.dataset;
const curves = [...plots.querySelectorAll('path[data-name]')].map(({dataset, attributes}) => ({...dataset,
  points: [...attributes.d.value.matchAll(/(-?[\\d.]+),(-?[\\d.]+)/g)].map(found => [+found[1], +found[2]])}));
const done = Math.max(0, ...curves.flatMap(curve => curve.points.map(point => point[0]))) / 1000;
plots.addEventListener('pointermove', event => {
  if (!done) return;
  const frame = crosses[0].ownerSVGElement.getBoundingClientRect();
  const share = Math.min(done, Math.max(0, (event.clientX - frame.left) / frame.width));
  const step = Math.round(share * end);
  const lines = curves.filter(curve => curve.points.length).map(({name, top, unit, points}) => {
    const nearest = points.reduce((a, b) => Math.abs(b[0] - share * 1000) < Math.abs(a[0] - share * 1000) ? b : a);
    return `${name}: ${((1 - nearest[1] / 1000) * top).toFixed(unit ? 1 : 3)}${unit && ' ' + unit}`;
  });
  const current = Math.max(1, Math.ceil(step / epoch));
  tip.textContent = [`iteration ${step.toLocaleString('en')}, epoch ${current}`, ...lines].join('\\n');
  tip.hidden = false;
  const left = frame.left - plots.getBoundingClientRect().left + share * frame.width;
  tip.style.left = `${share < .5 ? left + 14 : left - tip.offsetWidth - 14}px`;
  for (const cross of crosses) {
    for (const x of ['x1', 'x2']) cross.setAttribute(x, `${100 * share}%`);
    cross.setAttribute('visibility', 'visible');
  }
});
plots.addEventListener('pointerleave', () => {
  tip.hidden = true;
  for (const cross of crosses) cross.setAttribute('visibility', 'hidden');
});
"""

# Loading again keeps the scroll position; it waits while somebody reads values off the curves.
RELOAD_SCRIPT = "setInterval(() => { if (tip.hidden) location.reload(); }, 2000);\n"
