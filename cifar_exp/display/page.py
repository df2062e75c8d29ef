"""The live page of a run: one self-contained HTML file, drawn from the journal.

The parent draws it while the ranks train, so it must be cheap: curves are thinned before they become SVG, and no
plotting library is imported. Curves lie on a plane of ``PLANE`` x ``PLANE`` units that the browser stretches to the
window. Texts are placed in percent and keep their size.
"""

import math
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from cifar_exp.display.curves import Curves, RunFacts
from cifar_exp.display.page_assets import HOVER_SCRIPT, RELOAD_SCRIPT, STYLE
from cifar_exp.display.svg import ABSENT, number_text, plots_html
from cifar_exp.errors import FREE_SPACE, storage_errors
from cifar_exp.records.journal import Entry
from cifar_exp.system.atomic_files import write_atomically

PAGE_FILE = "progress.html"
LIVE = ("starting", "running")


def write_progress_page(run_dir: Path, entries: Sequence[Entry], facts: RunFacts, elapsed: float) -> Path:
    """Write ``progress.html`` atomically to the run's folder.

    Args:
        run_dir: the run's folder.
        entries: the journal so far.
        facts: further facts about the run.
        elapsed: seconds since the run began.

    Returns:
        The page's path.

    Raises:
        StorageError: where the file system refuses.
    """
    page = run_dir / PAGE_FILE
    text = page_html(entries, facts, elapsed)
    with storage_errors(page, FREE_SPACE):
        write_atomically(page, text, durable=False)  # it is drawn again and again
    return page


def page_html(entries: Sequence[Entry], facts: RunFacts, elapsed: float) -> str:
    """The page as HTML. It reloads itself every two seconds until the run has ended."""
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
{plots_html(accuracy, loss, step, facts)}
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


def seconds_left(entries: Sequence[Entry], facts: RunFacts) -> float | None:
    """Estimated time left, from the pace since the first entry; None while the pace is unknown."""
    if not entries or entries[-1].step <= entries[0].step:
        return None
    first, last = entries[0], entries[-1]
    pace = (last.time - first.time) / (last.step - first.step)
    return pace * (facts.epochs * facts.steps_per_epoch - last.step)


def duration(seconds: float | None) -> str:
    """For example ``4.2 s``, ``42 s``, ``3 min 05 s``, ``1 h 02 min``."""
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
        "images/s": number_text(rate, ",.0f"),
        "learning rate": number_text(latest.get("lr"), ".4g"),
        "training accuracy": number_text(accuracy.smooth[-1][1] if accuracy.smooth else None, ".1%"),
        "validation accuracy": number_text(latest.get("val/accuracy"), ".1%"),
        "test accuracy": number_text(latest.get("test/accuracy"), ".2%"),
    }
    if facts.status not in LIVE:
        del tiles["time left"]
    if "test/accuracy" not in latest:
        del tiles["test accuracy"]
    return tiles


def _tile(name: str, text: str) -> str:
    return f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>"


def _progress_bar(step: int, done: float, facts: RunFacts) -> str:
    steps = facts.epochs * facts.steps_per_epoch
    epochs = step // facts.steps_per_epoch
    return f"""<div class="progress {escape(facts.status)}" role="progressbar" aria-label="epochs done"
 aria-valuemin="0" aria-valuemax="{facts.epochs}" aria-valuenow="{epochs}"><i style="width:{done:.2%}"></i></div>
<p class="progress-text"><span>{epochs} of {facts.epochs} epochs done</span>
<span>{step:,} of {steps:,} iterations</span></p>"""


def _time_split(latest: Mapping[str, float]) -> str:
    """A bar of the time breakdown with names, seconds and shares; empty while that is unknown."""
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
