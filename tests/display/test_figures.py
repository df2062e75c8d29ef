"""The run's page and the figures show the content of the journal, for any content."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markupsafe import escape
from matplotlib.axes import Axes
from PIL import Image

from cifar_exp.display.curves import (
    MAX_POINTS,
    Curves,
    PageFacts,
    Point,
    averaged,
    axis_epochs,
    loss_top,
    smoothed,
    thinned,
    tick_step,
)
from cifar_exp.display.page import duration, page_html, seconds_left, write_progress_page
from cifar_exp.display.svg import line_path
from cifar_exp.display.templates import rendered
from cifar_exp.display.training_figure import draw_training, training_figure
from cifar_exp.errors import StorageError
from cifar_exp.records.journal import Entry
from cifar_exp.study.figures import comparison_figure, draw_speedup, speedup_figure
from cifar_exp.study.group import Group
from cifar_exp.study.intervals import Interval
from cifar_exp.study.run_result import RunResult
from cifar_exp.system.printable import printable_text

FACTS = PageFacts(
    title="convnet 32x4 on CIFAR-10",
    status="running",
    epochs=4,
    steps_per_epoch=100,
    lr_drops=[(3, 0.01)],
    details={"devices": "2 x cpu", "batch": "256 a device"},
)


def step_entry(step: int, loss: float, accuracy: float) -> Entry:
    metrics = {"step/loss": loss, "step/accuracy": accuracy, "step/images_per_second": 900.0, "lr": 0.1}
    return Entry(step, (step - 1) // 100 + 1, step * 0.5, metrics)


def epoch_entry(epoch: int, loss: float, accuracy: float) -> Entry:
    metrics = {"train/loss": 1.0, "train/accuracy": 0.5, "val/loss": loss, "val/accuracy": accuracy, "epoch": epoch}
    return Entry(epoch * 100, epoch, epoch * 50.0, metrics)


ENTRIES = [
    step_entry(50, 2.0, 0.20),
    step_entry(100, 1.0, 0.40),
    epoch_entry(1, 1.5, 0.30),
    step_entry(150, 0.8, 0.60),
    step_entry(200, 0.5, 0.70),
    epoch_entry(2, 1.0, 0.55),
    step_entry(250, 0.4, 0.80),
]
END = Entry(
    400,
    4,
    210.0,
    {
        "test/accuracy": 0.8662,
        "test/count": 10000,
        "steady_images_per_second": 1234.0,
        "time_split/step": 150.0,
        "time_split/startup": 50.0,
        "time_split/compile": 0.0,
        "time_split/other": -0.1,
    },
)


def svg_path(page: str, plot: str, kind: str) -> str:
    """The data of the path of class ``kind`` in the figure ``plot``."""
    figure = page.split(f'<figure class="{plot}">')[1].split("</figure>")[0]
    found = re.search(rf'<path class="{kind}"[^>]* d="([^"]*)"', figure)
    assert found
    return found[1]


def tiles(page: str) -> dict[str, str]:
    return dict(re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", page))


def test_points_are_plotted_at_the_journals_values() -> None:
    page = page_html(ENTRIES, FACTS, 125.0)
    # 400 iterations on 1000 units, accuracy 0 to 1 and loss 0 to 2 on 1000 units from below
    assert svg_path(page, "accuracy", "raw") == "M125.0,800.0 250.0,600.0 375.0,400.0 500.0,300.0 625.0,200.0"
    assert svg_path(page, "accuracy", "dots") == "M250.0,700.0h0M500.0,450.0h0"
    assert svg_path(page, "loss", "raw") == "M125.0,0.0 250.0,500.0 375.0,600.0 500.0,750.0 625.0,800.0"
    assert svg_path(page, "loss", "validation") == "M250.0,250.0 500.0,500.0"


def test_header_shows_the_status() -> None:
    page = page_html(ENTRIES, FACTS, 125.0)
    shown = tiles(page)
    assert shown["elapsed"] == "2 min 05 s"
    assert shown["time left"] == "1 min 15 s"  # 150 of 400 iterations are left, at 0.5 s each
    assert shown["images/s"] == "900"
    assert shown["learning rate"] == "0.1"
    assert shown["validation accuracy"] == "55.0%"
    assert "test accuracy" not in shown
    assert "2 of 4 epochs done" in page
    assert "250 of 400 iterations" in page
    assert 'style="width:62.50%"' in page


def test_finished_page_shows_test_accuracy_and_where_the_time_went() -> None:
    page = page_html([*ENTRIES, END], replace(FACTS, status="finished"), 210.0)
    assert tiles(page)["test accuracy"] == "86.62%"
    assert tiles(page)["images/s"] == "1,234"
    assert "time left" not in tiles(page)
    shares = re.findall(r"</i>(\w+)</th><td>([^<]*)</td><td>([^<]*)</td>", page)
    assert shares == [("Step", "2 min 30 s", "75.0%"), ("Startup", "50 s", "25.0%")]


def test_learning_rate_drop_is_drawn_and_labelled() -> None:
    page = page_html(ENTRIES, FACTS, 1.0)
    assert page.count('<line class="drop" x1="75.00%" x2="75.00%"') == 2  # in both plots
    assert ">lr 0.01</text>" in page
    early = page_html(ENTRIES[:1], FACTS, 1.0)  # its axis ends before the drop
    assert "lr 0.01" not in early


@pytest.mark.parametrize("status", ["starting", "running", "finished", "failed", "stopped"])
def test_page_reloads_only_while_the_run_is_training(status: str) -> None:
    page = page_html(ENTRIES, replace(FACTS, status=status), 1.0)
    assert ("location.reload" in page) == (status in ("starting", "running"))
    assert ("the process may have been killed" in page) == (status in ("starting", "running"))
    assert f'<span class="badge {status}">{status}</span>' in page


def test_page_before_the_first_entry() -> None:
    page = page_html([], replace(FACTS, status="starting"), 0.5)
    assert "The curves begin with the first iterations" in page
    assert svg_path(page, "loss", "raw") == ""
    assert "0 of 4 epochs done" in page


def test_page_has_no_external_resources() -> None:
    page = page_html([*ENTRIES, END], FACTS, 1.0)
    assert not re.search(r"(src|href)=|url\((?!#)|@import|https?:", page)


def test_texts_are_escaped() -> None:
    evil = "<script>alert('1')</script>&\"{{ 1 }}\x00\x1b\x85"
    facts = replace(FACTS, title=evil, details={evil: evil})
    page = page_html([*ENTRIES, Entry(400, 4, 1.0, {f"time_split/{evil}": 1.0})], facts, 1.0)
    assert page.count("<script>") == 1  # the page's own
    assert (
        page.count(str(escape(printable_text(evil)))) == 6
    )  # title, heading, the detail's name and text, the bar's tooltip and row


def test_markup_is_well_formed() -> None:
    page = page_html([*ENTRIES, END], FACTS, 1.0)
    for svg in re.findall(r'<svg class="frame".*?</figure>', page, re.DOTALL):
        root = ElementTree.fromstring(svg.removesuffix("</figure>"))
        assert root.attrib["role"] == "img"
        assert re.match(r"(accuracy|loss) over 400 iterations: training ", root.attrib["aria-label"])
    checker = Balance()
    checker.feed(page)
    assert checker.open == []


class Balance(HTMLParser):
    """Tags that were opened and not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_values_that_are_not_finite_leave_gaps() -> None:
    values = (2.0, math.nan, 1.0, 0.5, math.inf, 0.4)
    entries = [step_entry(50 * number, loss, 0.5) for number, loss in enumerate(values, 1)]
    page = page_html([*entries, epoch_entry(3, math.inf, math.nan)], FACTS, 1.0)
    assert svg_path(page, "loss", "raw") == "M125.0,0.0M375.0,500.0 500.0,750.0M750.0,800.0"
    assert svg_path(page, "loss", "dots") == ""
    assert tiles(page)["validation accuracy"] == "\u2013"
    assert not re.search(r"\b(nan|inf)\b", page.split("<main>")[1].split("<aside>")[0].replace("data-unit", ""))


def test_run_shorter_than_a_logged_block_shows_its_epochs() -> None:
    page = page_html([epoch_entry(1, 1.5, 0.3), epoch_entry(2, 1.0, 0.5)], FACTS, 1.0)
    assert svg_path(page, "accuracy", "raw") == "M500.0,500.0 1000.0,500.0"  # train/accuracy; two epochs are shown


def test_long_run_is_thinned() -> None:
    entries = [step_entry(step, 1 + step % 7 / 10, 0.5) for step in range(1, 11_701)]
    facts = replace(FACTS, epochs=117)
    page = page_html(entries, facts, 1.0)
    for plot in ("accuracy", "loss"):
        for kind in ("raw", "smooth"):
            assert 300 <= svg_path(page, plot, kind).count(",") <= MAX_POINTS
    assert len(page) < 100_000


def test_thinned_curve_keeps_ends_extremes_and_gaps() -> None:
    points: list[Point] = [(step, math.sin(step)) for step in range(10_000)]
    points[4321], points[7000], points[8000] = (4321, 9.0), (7000, -9.0), (8000, math.nan)
    kept = thinned(points, limit=100)
    assert len(kept) <= 100
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert (4321, 9.0) in kept
    assert (7000, -9.0) in kept
    assert any(math.isnan(value) for _, value in kept)
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert thinned(points[:100], limit=100) == points[:100]


def test_averages_cover_every_point_once() -> None:
    points: list[Point] = [(step, float(step)) for step in range(1, 1001)]
    means = averaged(points, limit=10)
    assert means == [(100.0 * part, 100 * part - 49.5) for part in range(1, 11)]


def test_smoothing_follows_a_step_at_the_given_rate() -> None:
    points: list[Point] = [(step, 0.0 if step <= 1000 else 1.0) for step in range(1, 2001)]
    smooth = dict(smoothed(points, steps=100))
    assert smooth[1000] == 0
    assert smooth[1100] == pytest.approx(1 - math.exp(-1), abs=0.01)
    assert smooth[2000] == pytest.approx(1, abs=0.001)
    assert smoothed([(10, 3.0)], steps=100) == [(10, 3.0)]  # the first value is not drawn towards zero


def test_axis_shows_halves_of_the_run_until_it_is_full() -> None:
    facts = replace(FACTS, epochs=60, steps_per_epoch=100)
    assert [axis_epochs(step, facts) for step in (0, 100, 101, 401, 1600, 3000, 3001, 6000)] == [
        1, 1, 2, 8, 30, 30, 60, 60,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("span", "most", "step"), [(60, 10, 10), (100, 5, 20), (2.3, 5, 0.5), (0.03, 5, 0.01), (3, 5, 1)]
)
def test_ticks_stand_at_round_numbers(span: float, most: int, step: float) -> None:
    assert tick_step(span, most) == pytest.approx(step)


def test_loss_axis_includes_the_first_loss_but_no_spike() -> None:
    usual = [(float(step), 0.5) for step in range(100)]
    assert loss_top(Curves([(0.0, 2.3), *usual], [], [])) == 2.5
    assert loss_top(Curves([*usual, (100.0, 1e30)], [], [])) == 2.5
    assert loss_top(Curves([(0.0, math.nan)], [], [])) == 1.0
    assert line_path([(1, 1e300)], 1, 2.5) == "M1000.0,-999000.0"  # within float32, or the browser drops the path


def test_durations_read_like_a_clock() -> None:
    assert [duration(seconds) for seconds in (0.04, 42.4, 59.6, 185, 3599.6, 3725, None, math.nan)] == [
        "0.0 s", "42 s", "1 min 00 s", "3 min 05 s", "1 h 00 min", "1 h 02 min", "\u2013", "\u2013",
    ]  # fmt: skip


def test_time_left_needs_a_pace() -> None:
    assert seconds_left([], FACTS) is None
    assert seconds_left(ENTRIES[:1], FACTS) is None
    assert seconds_left(ENTRIES[:2], FACTS) == 150.0  # 300 iterations at 0.5 s


def test_page_is_written_atomically(tmp_path: Path) -> None:
    write_progress_page(tmp_path, ENTRIES[:1], FACTS, 1.0)
    path = write_progress_page(tmp_path, ENTRIES, FACTS, 1.0)
    assert path == tmp_path / "progress.html"
    assert "250 of 400 iterations" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_page_that_cannot_be_written_raises_and_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "progress.html").mkdir()  # in the way, for root too
    with pytest.raises(StorageError, match=r"progress\.html cannot be written"):
        write_progress_page(tmp_path, ENTRIES, FACTS, 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["progress.html"]


def test_ranks_import_no_page_code() -> None:
    code = "import sys, cifar_exp.worker.train_job, cifar_exp.display.page; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_page_needs_no_matplotlib() -> None:
    code = (
        "import sys, cifar_exp.display.training_figure as f; from cifar_exp.display.page import page_html; "
        "page_html([], f.PageFacts('', 'running', 1, 1, [], {}), 0.0); sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {
        str(line.get_label()): [(float(x), pytest.approx(float(y))) for x, y in line.get_xydata()]
        for line in axes.get_lines()
    }


def test_training_figure_shows_the_journal(tmp_path: Path) -> None:
    figure = training_figure(ENTRIES, replace(FACTS, status="finished"))
    accuracy, loss = figure.axes
    assert lines(accuracy)["training"] == [(50, 20), (100, 40), (150, 60), (200, 70), (250, 80)]
    assert lines(accuracy)["validation"] == [(100, 30), (200, 55)]
    assert lines(loss)["validation"] == [(100, 1.5), (200, 1.0)]
    assert any(set(line.get_xdata()) == {300} for line in accuracy.get_lines())  # the learning rate drops
    assert "lr 0.01" in [text.get_text() for text in accuracy.texts]
    assert accuracy.get_ylim() == (0, 100)
    assert loss.get_ylim() == (0, 2)
    draw_training([*ENTRIES, END], FACTS, tmp_path / "training.png")
    assert Image.open(tmp_path / "training.png").size == (1200, 768)


@pytest.mark.parametrize("entries", [[], [step_entry(50, math.nan, math.nan)]])
def test_training_figure_of_a_run_without_values(tmp_path: Path, entries: list[Entry]) -> None:
    draw_training(entries, replace(FACTS, status="failed"), tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 1000


def study(rates: dict[int, float], off: float = 0.0) -> Group:
    """Two runs a count, ``off`` of the rate to either side of it; weak scaling."""
    sides = (-off, off) if off else (0.0,)
    return Group.of(
        [
            RunResult(count, 256 * count, rate * (1 + side), 60_000 / rate, 0.86 + side)
            for count, rate in rates.items()
            for side in sides
        ]
    )


def without_laws(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """The lines but for the fitted laws, and for the ends of the intervals' bars, which have no label."""
    return {name: line for name, line in lines(axes).items() if "serial" not in name and not name.startswith("_")}


def test_speedup_figure_shows_every_group_beside_the_ideal() -> None:
    figure = speedup_figure({"weak": study({1: 100, 2: 190, 4: 360}), "strong": study({1: 100, 2: 150})}, False)
    speedup, efficiency, seconds, accuracy = figure.axes
    assert without_laws(speedup) == {
        "ideal": [(1, 1), (4, 4)],
        "weak": [(1, 1), (2, 1.9), (4, 3.6)],
        "strong": [(1, 1), (2, 1.5)],
    }
    assert without_laws(efficiency)["weak"] == [(1, 100), (2, 95), (4, 90)]
    assert without_laws(accuracy)["strong"] == [(1, 86), (2, 86)]
    assert [text.get_text() for text in speedup.texts] == ["1.90", "3.60", "1.50"]
    assert [bar.get_height() for bar in seconds.patches] == pytest.approx(
        [600 / 60, 316 / 60, 167 / 60, 600 / 60, 400 / 60], abs=0.02
    )
    assert [text.get_text() for text in seconds.texts] == ["10 min", "5.3 min", "2.8 min", "10 min", "6.7 min"]
    assert speedup.get_xscale() == speedup.get_yscale() == "log"
    assert figure.get_suptitle() == "Speedup by device count"


def test_intervals_are_bars_from_end_to_end() -> None:
    group = study({1: 100, 2: 190}, off=0.01)
    speedup, _, _, accuracy = speedup_figure({"": group}, False).axes
    interval = group.rows[1].intervals["speedup"]
    (bars,) = speedup.collections
    (segment,) = bars.get_segments()  # type: ignore[attr-defined]
    assert [tuple(end) for end in segment] == [(2, pytest.approx(interval.low)), (2, pytest.approx(interval.high))]
    assert len(accuracy.collections[0].get_segments()) == 2  # type: ignore[attr-defined]


def test_the_fitted_laws_are_drawn_over_the_measured_range() -> None:
    group = study({1: 100, 2: 190, 4: 361})
    axes = speedup_figure({"": group}, False).axes[0]
    laws = {name: line for name, line in lines(axes).items() if "serial" in name}
    assert [name.partition(",")[0] for name in laws] == ["Gustafson", "Amdahl"]  # the batch grows with the devices
    for fit, line in zip(group.fits, laws.values(), strict=True):
        assert line[0] == (1, 1)
        assert line[-1] == (pytest.approx(4), fit.speedup(4))


def test_speedup_axes_are_linear_where_counts_are_no_powers_of_two() -> None:
    speedup, _, seconds, _ = speedup_figure({"": study({2: 6000, 3: 7500})}, False).axes
    assert speedup.get_xscale() == speedup.get_yscale() == "linear"
    assert without_laws(speedup) == {"ideal": [(2, 1), (3, 1.5)], "measured": [(2, 1), (3, 1.25)]}
    assert [text.get_text() for text in seconds.texts] == ["10 s", "8 s"]
    assert [label.get_text() for label in speedup.get_xticklabels()] == ["2", "3"]


def test_simulated_devices_are_named_so(tmp_path: Path) -> None:
    groups = {"": study({1: 555, 2: 993}, off=0.01)}
    figure = speedup_figure(groups, simulated=True)
    assert "CPU-simulated" in figure.get_suptitle()
    assert all("CPU-simulated" in axes.get_xlabel() for axes in figure.axes)
    draw_speedup(groups, tmp_path / "speedup.png", simulated=True)
    assert Image.open(tmp_path / "speedup.png").size == (1200, 1032)
    assert (tmp_path / "speedup.png").stat().st_size < 200_000


def test_comparison_figure_shows_both_sweeps_and_their_ratio() -> None:
    pairs = [("", study({1: 100, 2: 190}), study({1: 100, 2: 200}), {1: (1.0, None), 2: (1.05, Interval(1.01, 1.1))})]
    rates, ratios = comparison_figure(("A: before", "B: after"), pairs, False).axes
    assert without_laws(rates) == {"A: before": [(1, 100), (2, 190)], "B: after": [(1, 100), (2, 200)]}
    (bars,) = ratios.collections
    (segment,) = bars.get_segments()  # type: ignore[attr-defined]
    assert [float(end[1]) for end in segment] == pytest.approx([1.01, 1.1])
    assert ratios.get_title() == "Images/s: B / A"


def test_missing_template_is_not_reported_as_a_full_disk(tmp_path: Path) -> None:
    """Jinja2's error for it is an OSError, which is what a full disk raises where the page is written."""
    with pytest.raises(RuntimeError, match=r"page\.html: the installation lacks a file of it"):
        rendered(tmp_path / "page.html")
