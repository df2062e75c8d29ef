"""The live page of a run: one self-contained HTML file, drawn from the journal.

The parent draws it while the ranks train, so it must be cheap: curves are thinned before they become SVG, and no
plotting library is imported. Curves lie on a plane of ``PLANE`` x ``PLANE`` units that the browser stretches to the
window. Texts are placed in percent and keep their size.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cifar_exp.display.curves import Curves, PageFacts, axis_epochs, loss_top
from cifar_exp.display.svg import ABSENT, PLANE, Axis, Plot, number_text
from cifar_exp.display.templates import rendered
from cifar_exp.errors import FREE_SPACE, storage_errors
from cifar_exp.records.journal import Entry
from cifar_exp.system.atomic_files import write_atomically

PAGE_FILE = "progress.html"
LIVE = ("starting", "running")


def write_progress_page(run_dir: Path, entries: Sequence[Entry], facts: PageFacts, elapsed: float) -> Path:
    """Write ``progress.html`` atomically to the run's folder.

    Args:
        run_dir: the run's folder.
        entries: the journal so far.
        facts: further facts about the run.
        elapsed: seconds since the run began.

    Returns:
        The page's path.

    Raises:
        StorageError: a file cannot be written.
    """
    page = run_dir / PAGE_FILE
    text = page_html(entries, facts, elapsed)
    with storage_errors(page, FREE_SPACE):
        write_atomically(page, text, durable=False)  # it is drawn again and again
    return page


def page_html(entries: Sequence[Entry], facts: PageFacts, elapsed: float) -> str:
    """The page as HTML. While its status is starting or running, it reloads every two seconds.

    Two minutes after its last drawing, as after SIGKILL, it says so and reloads every half minute.
    """
    latest: dict[str, float] = {}
    for entry in entries:
        latest.update(entry.metrics)
    step = entries[-1].step if entries else 0
    steps = facts.epochs * facts.steps_per_epoch
    done = step / steps
    accuracy = Curves.of(entries, "accuracy", facts.steps_per_epoch)
    loss = Curves.of(entries, "loss", facts.steps_per_epoch)
    live = facts.status in LIVE
    epochs_shown = axis_epochs(step, facts)
    axis_end = epochs_shown * facts.steps_per_epoch
    total, shares = _time_shares(latest)
    return rendered(
        Path(__file__).with_name("page.html"),
        title=facts.title,
        status=facts.status,
        ended_early=facts.ended_early,
        live=live,
        done=f"{done:.0%}",
        width=f"{done:.2%}",
        epochs=facts.epochs,
        epochs_done=step // facts.steps_per_epoch,
        step=f"{step:,}",
        steps=f"{steps:,}",
        started=step > 0,
        tiles=_tiles(latest, accuracy, facts, elapsed, seconds_left(entries, facts) if live else None),
        plane=PLANE,
        axis=Axis.of(epochs_shown, facts),
        plots=[
            Plot.of("accuracy", "%", accuracy, 1.0, axis_end),
            Plot.of("loss", "", loss, loss_top(loss), axis_end),
        ],
        shares_total=duration(total),
        shares=shares,
        details=facts.details,
        drawn=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def seconds_left(entries: Sequence[Entry], facts: PageFacts) -> float | None:
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
    latest: Mapping[str, float], accuracy: Curves, facts: PageFacts, elapsed: float, left: float | None
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


def _time_shares(latest: Mapping[str, float]) -> tuple[float, list[dict[str, str]]]:
    """The time breakdown: seconds in total, and each part's texts, the longest first. No parts while it is unknown."""
    prefix = "time_split/"
    seconds = {
        name.removeprefix(prefix): value
        for name, value in latest.items()
        if name.startswith(prefix) and math.isfinite(value) and value > 0
    }
    total = sum(seconds.values())
    return total, [
        {"name": name, "time": duration(value), "share": f"{value / total:.4f}", "percent": f"{value / total:.1%}"}
        for name, value in sorted(seconds.items(), key=lambda item: -item[1])
    ]
