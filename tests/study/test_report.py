"""A study's table, CSV, page and metrics agree with its runs; two sweeps are compared quantity by quantity."""

import csv
import errno
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cifar_exp.config.schema import ReportSettings
from cifar_exp.errors import ConfigError, StorageError
from cifar_exp.study.comparison import Comparison
from cifar_exp.study.finished_runs import FinishedRun, overlapping, results_by_group
from cifar_exp.study.report_page import report_html
from cifar_exp.study.speedup_study import Study
from cifar_exp.study.sweep_report import report_settings
from cifar_exp.study.time_breakdown import PARTS, Breakdown, rank_table


def finished(devices: int, seed: int, rate: float, accuracy: float = 0.8, *more: str, load: float = 0.0) -> FinishedRun:
    """A run of 40 steps of 64 images a device, with blocks of 2, whose first is slow."""
    overrides = f"experiment=speedup seed={seed} devices.count={devices} {' '.join(more)}".strip()
    tags = {"overrides": overrides, "accelerator": "cpu", "machine.processor": "Z80", "machine.cores": "2"}
    metrics = {
        "devices": devices,
        "global_batch_size": 64.0 * devices,
        "steady_images_per_second": rate,
        "time/train_seconds": 40 * 64 * devices / rate + 1,
        "time/total_seconds": 40 * 64 * devices / rate + 9,
        "test/accuracy": accuracy,
        "machine/other_load": load,
    }
    blocks = [(2 * number, number * 1.0, rate if number > 1 else rate / 2) for number in range(1, 21)]
    return FinishedRun(tags, metrics, {"step/images_per_second": blocks, "val/accuracy": [(40, 12.0, accuracy)]})


RUNS = [
    *(finished(1, seed, rate, 0.80 + 0.01 * seed) for seed, rate in enumerate((100, 102, 98))),
    *(finished(2, seed, rate, 0.79 + 0.01 * seed) for seed, rate in enumerate((190, 186, 194))),
]


def test_the_csv_keeps_its_columns_and_gains_the_intervals(tmp_path: Path) -> None:
    study = Study.of(RUNS)
    assert study is not None
    study.write(tmp_path)
    first, second = csv.DictReader((tmp_path / "speedup.csv").open())
    assert list(first)[:11] == [
        *("group", "cpu_simulated", "devices", "repeats", "global_batch_size", "images_per_second", "speedup"),
        *("efficiency", "train_seconds", "time_ratio", "test_accuracy"),
    ]
    assert (first["speedup"], first["speedup_low"], first["repeats"]) == ("1.0", "", "3")
    assert float(second["speedup_low"]) < float(second["speedup"]) == 1.9 < float(second["speedup_high"])
    assert float(second["efficiency_high"]) == pytest.approx(float(second["speedup_high"]) / 2)
    assert float(second["steady_seconds"]) == pytest.approx(40 * 128 / 190)
    assert float(second["total_seconds"]) == pytest.approx(40 * 128 / 190 + 9)
    assert (second["blocks"], second["reached"]) == ("19", "")


def test_a_study_that_cannot_be_written_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, comparison = Study.of(RUNS), Comparison.of(("A: old", "B: new"), RUNS, RUNS)
    assert study is not None
    kept = {path: path.read_bytes() for path in (*study.write(tmp_path), *comparison.write(tmp_path))}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for report in (study, comparison):
        with pytest.raises(StorageError, match="No space left"):
            report.write(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_page_has_figure_tables_and_notes(tmp_path: Path) -> None:
    runs = [finished(1, 0, 100), finished(1, 1, 101), finished(2, 0, 190, load=0.3), finished(2, 1, 191)]
    study = Study.of(runs, ReportSettings(target_accuracy=0.5, price_per_hour=36))
    assert study is not None
    page = study.write(tmp_path)[2].read_text()
    for part in (
        "Speedup by device count (CPU-simulated)",
        "data:image/png;base64,",
        "Z80, 2 cores",
        "<td>2 of 2</td>",
        "<td>24.0</td>",  # device-seconds: 12 s on two devices
        "<td>0.24</td>",
        "<td>1 of 2</td>",
        "DISTURBED: 1 of 2 runs on 2 devices: other processes took 30% of the cores at worst",
        "warning: only two device counts",
        "Gustafson&#39;s law: serial fraction",
    ):
        assert part in page, part


# 100 s of a run on two ranks, of which the second is the slow one.
TIMES = {
    **{"time_split/startup": 5.0, "time_split/step": 70.0, "time_split/data": 2.0, "time_split/communication": 8.0},
    **{"time_split/evaluation": 14.0, "time_split/other": 1.0},
    **{"rank_time/0/compute": 70.0, "rank_time/0/data": 2.0, "rank_time/0/evaluation": 14.0},
    **{"rank_time/0/communication": 2.0, "rank_time/0/waiting": 6.0, "rank_time/0/hidden_communication": 4.0},
    **{"rank_time/1/compute": 76.0, "rank_time/1/data": 2.0, "rank_time/1/evaluation": 14.0},
    **{"rank_time/1/communication": 2.0, "rank_time/1/waiting": 0.0, "rank_time/1/hidden_communication": 4.0},
    **{"rank_time/0/last_share": 0.1, "rank_time/1/last_share": 0.9},
    **{"communication/bytes_per_step": 2.7e6, "communication/link_bytes_per_second": 1.35e9},
}


def test_time_breakdown_adds_up_and_names_the_slowest_rank() -> None:
    breakdown = Breakdown.of(2, [TIMES, {"devices": 2.0}], steps=400)
    assert breakdown is not None
    assert tuple(breakdown.shares) == PARTS
    assert sum(breakdown.shares.values()) == pytest.approx(1)
    # Means over the ranks, whichever of them is the slow one.
    assert breakdown.shares["computing"] == pytest.approx(0.73)
    assert breakdown.shares["exposed all-reduce"] == pytest.approx(0.02)
    assert breakdown.shares["waiting for the slowest rank"] == pytest.approx(0.03)
    assert breakdown.shares["start-up and other"] == pytest.approx(0.06)
    assert breakdown.notes == [
        "warning: on 2 devices: straggler: rank 1 came last in 90% of the steps; the others waited 7.5% of their "
        "training time for it",
        "on 2 devices: each rank sends 2.7 MB per step; the link carries 1.35 GB/s, so that takes 2 ms; a step took "
        "5 ms of exposed and 10 ms of overlapped communication",
    ]
    assert Breakdown.of(2, [{"devices": 2.0}], steps=400) is None


def test_page_has_the_time_breakdown_by_rank(tmp_path: Path) -> None:
    runs = [finished(1, 0, 100), finished(2, 0, 190)]
    runs[1] = FinishedRun(runs[1].tags, {**runs[1].metrics, **TIMES}, runs[1].series)
    study = Study.of(runs)
    assert study is not None
    page = study.write(tmp_path)[2].read_text()
    cells = "".join(f"<td>{text}</td>" for text in ("2", "1", "76.00", "4.00", "2.00", "0.00", "2.00", "14.00", "90%"))
    for part in (
        "Where the time went, by rank",
        f"<tr>{cells}</tr>",
        "<td>time: waiting for the slowest rank</td><td></td><td>3.0%</td>",
        '<li class="warning">warning: on 2 devices: straggler: rank 1',
    ):
        assert part in page, part


def test_metrics_of_the_parent_run_have_the_count_as_their_step() -> None:
    study = Study.of(RUNS)
    assert study is not None
    metrics = {(name, step): value for name, value, step in study.metrics()}
    assert metrics["speedup", 2] == 1.9
    assert metrics["efficiency", 2] == pytest.approx(0.95)
    assert metrics["speedup_low", 2] < 1.9 < metrics["speedup_high", 2]
    assert metrics["serial_fraction_gustafson", 2] == pytest.approx(0.1, abs=0.001)
    assert ("speedup_low", 1) not in metrics
    weak = [finished(n, 0, 100.0 * n, 0.8, "train.scaling=weak") for n in (1, 2)]
    strong = [finished(n, 0, 80.0 * n, 0.8, "train.scaling=strong") for n in (1, 2)]
    both = Study.of([*weak, *strong])
    assert both is not None
    named = {name for name, _, _ in both.metrics()}
    assert {"speedup/weak", "speedup/strong", "images_per_second/weak"} <= named


def test_group_names_keep_values_with_spaces() -> None:
    runs = [
        finished(n, 0, 100.0 * n, 0.8, f"train.image_scales={scales}")
        for scales in ("[0.5, 1]", "null")
        for n in (1, 2)
    ]
    study = Study.of(runs)
    assert study is not None
    assert list(study.groups) == ["[0.5, 1]", "null"]


def test_runs_that_share_a_device_and_single_counts_are_no_study() -> None:
    assert Study.of(RUNS[:3]) is None
    shared = [FinishedRun({**run.tags, "oversubscribed": "true"}, run.metrics, run.series) for run in RUNS]
    assert Study.of(shared) is None


def test_two_sweeps_differ_where_the_difference_is_beyond_their_noise(tmp_path: Path) -> None:
    """The second is 10 % faster on one device, with noise of 2 %, and the same on two."""
    faster = [
        *(finished(1, seed, rate, 0.80 + 0.01 * seed) for seed, rate in enumerate((110, 112.2, 107.8))),
        *(finished(2, seed, rate, 0.79 + 0.01 * seed) for seed, rate in enumerate((191, 186, 193))),
    ]
    comparison = Comparison.of(("A: old", "B: new"), RUNS, faster)
    found = {(item.devices, item.quantity): item for item in comparison.differences}
    one = found[1, "images_per_second"]
    assert (one.first, one.second, one.change) == (100, 110, pytest.approx(1.1))
    assert one.interval is not None
    assert one.interval.low > 1.04
    assert one.verdict == "beyond noise"
    assert found[2, "images_per_second"].verdict == "within noise"
    gained = found[2, "speedup"]
    assert (gained.first, gained.second) == (1.9, pytest.approx(191 / 110))
    assert gained.change == pytest.approx(191 / 110 / 1.9)
    assert gained.interval is not None
    assert gained.interval.high < 0.97  # what one device gained, two lost
    assert (1, "speedup") not in found
    accuracy = found[1, "test_accuracy"]
    assert (accuracy.change, accuracy.verdict, accuracy.probability) == (0, "within noise", 1)
    table, figure, page = comparison.write(tmp_path)
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 7
    assert rows[0]["difference"] == "beyond noise"
    assert figure.stat().st_size > 1000
    assert "B: new against A: old (CPU-simulated)" in page.read_text()
    assert "Welch" in page.read_text()


def test_equal_sweeps_differ_in_5_of_100_families_at_most() -> None:
    """Three seeds, two counts, seven differences each, with noise that doubles with the count."""
    rng = np.random.default_rng(3)
    families = 200

    def sweep() -> list[FinishedRun]:
        return [
            finished(count, seed, 100 * count * math.exp(0.02 * count * rng.normal()), 0.8 + 0.01 * rng.normal())
            for count in (1, 2)
            for seed in range(3)
        ]

    wrong = sum(
        any(item.verdict == "beyond noise" for item in Comparison.of(("A", "B"), sweep(), sweep()).differences)
        for _ in range(families)
    )
    assert wrong <= families * (0.05 + 3 * math.sqrt(0.05 * 0.95 / families))


def test_sweeps_of_single_runs_claim_no_difference() -> None:
    """Their blocks of steps say nothing about another run."""
    faster = [replace(run, metrics={**run.metrics, "steady_images_per_second": 500.0}) for run in RUNS]
    for first, second in ((RUNS[::3], faster[::3]), (RUNS, faster[::3]), (RUNS[::3], faster)):
        compared = Comparison.of(("A", "B"), first, second)
        assert {item.verdict for item in compared.differences} == {"noise between runs unknown"}
        assert {(item.interval, item.probability) for item in compared.differences} == {(None, None)}
        assert any(note.startswith("noise between runs unknown") for note in compared.notes)


def test_sweeps_without_anything_in_common_are_refused() -> None:
    with pytest.raises(ConfigError, match="no finished runs of the same group and device count"):
        Comparison.of(("A", "B"), RUNS, [finished(8, 0, 700.0)])


def test_jobs_that_did_not_finish_are_named_beside_the_figures_that_lack_them(tmp_path: Path) -> None:
    study = Study.of(RUNS, unfinished=["seed=1 devices.count=4: failed (6): the loss is nan"])
    assert study is not None
    warning = "warning: not in these figures: seed=1 devices.count=4: failed (6): the loss is nan"
    with (tmp_path / "shown").open("w") as file:
        study.print(Console(file=file, width=200))
    assert warning in (tmp_path / "shown").read_text()
    assert warning in study.write(tmp_path)[2].read_text()


def test_unmeasured_times_are_blank_and_noted() -> None:
    """GPUs average gradients asynchronously: the host only measures steps."""
    metrics = {"time_split/step": 8.0, "time_split/other": 2.0}
    for rank in (0, 1):
        metrics |= {f"rank_time/{rank}/{name}": value for name, value in (("compute", 7.5), ("data", 0.5))}
    breakdown = Breakdown.of(2, [metrics], steps=10)
    assert breakdown is not None
    assert breakdown.shares == pytest.approx(
        {"computing": 0.75, "data": 0.05, "evaluation": 0, "start-up and other": 0.2}
    )
    assert breakdown.notes == [
        "on 2 devices: exposed all-reduce and waiting for the slowest rank were not measured and are part of computing"
    ]
    assert rank_table([breakdown])[1] == ["2", "0", "7.50", "", "", "", "0.50", "", ""]


def test_differing_settings_of_two_sweeps_are_listed() -> None:
    def with_settings(runs: list[FinishedRun], **settings: object) -> list[FinishedRun]:
        return [replace(run, params={"seed": seed, **settings}) for seed, run in enumerate(runs)]

    first = with_settings(RUNS, **{"train.epochs": 2, "train.scaling": "weak", "tracking.uri": "x"})
    second = with_settings(RUNS[::-1], **{"train.epochs": "5", "train.scaling": "weak", "tracking.uri": "y"})
    compared = Comparison.of(("A: old", "B: new"), first, second)
    assert [note for note in compared.notes if "=" in note] == ["A has train.epochs=2, B train.epochs=5"]


def test_texts_on_the_page_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "figure.png").write_bytes(b"")
    page = report_html("<b>", tmp_path / "figure.png", [("<i>", [["<u>"], ["<s>"]], ["warning: <p1>"])], ["<m1>"])
    for text in ("b", "i", "u", "s", "p1", "m1"):
        assert f"<{text}>" not in page
        assert f"&lt;{text}&gt;" in page
    assert '<li class="warning">' in page


def test_runs_that_overlap_in_time_on_one_host_are_left_out() -> None:
    def at(started: float, host: str) -> FinishedRun:
        run = RUNS[0]
        return FinishedRun({**run.tags, "host": host}, {**run.metrics, "time/total_seconds": 10.0}, started=started)

    first, second, third, later = at(0, "a"), at(9, "a"), at(12, "a"), at(30, "a")
    elsewhere = at(5, "b")
    assert overlapping([later, third, second, first, elsewhere]) == [first, second, third]
    assert overlapping([first, at(10, "a"), later]) == []
    assert sum(map(len, results_by_group([first, second, later]).values())) == 1
    assert overlapping(RUNS) == []  # when they began is not known


def test_a_study_of_overlapping_runs_has_no_speedup() -> None:
    timed = [
        FinishedRun(run.tags, {**run.metrics, "time/total_seconds": 10.0}, run.series, started=number)
        for number, run in enumerate(RUNS)
    ]
    assert Study.of(timed) is None


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, (0.0, -1.0, math.nan, math.inf, 1e300, 1e-300)) for name in ("steady_images_per_second",)),
        *((name, (0.0, -1.0, math.nan, math.inf, 1e300, 1e-300)) for name in ("time/train_seconds",)),
        *((name, (0.0, 0.5, -1.0, math.nan, math.inf, 1e300)) for name in ("devices", "global_batch_size")),
        *((name, (-0.1, 1.1, math.nan, math.inf, 1e300)) for name in ("test/accuracy",)),
        ("time/total_seconds", (-1.0, math.nan)),
        ("machine/other_load", (math.inf,)),
        ("time_split/step", (math.nan, math.inf, 1e308)),
        ("rank_time/0/compute", (math.nan, math.inf)),
        ("rank_time/x/compute", (1.0,)),
        ("rank_time/0/last_share", (1.0,)),
        ("communication/link_bytes_per_second", (1.0,)),  # without the bytes that are sent
    ],
    ids=str,
)
def test_values_that_no_run_has_are_refused_with_their_run(name: str, values: tuple[float, ...]) -> None:
    times = {"time_split/step": 1.0, "time_split/data": 1.0}
    for value in values:
        wrong = replace(RUNS[1], metrics={**RUNS[1].metrics, **times, name: value})
        with pytest.raises(StorageError, match=r"the metrics of the run with .*seed=1 .* are invalid: .*Leave it out"):
            Study.of([RUNS[0], wrong, *RUNS[2:]])


@pytest.mark.parametrize("name", ["val/accuracy", "step/images_per_second"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_values_of_a_series_that_no_run_has_are_refused(name: str, value: float) -> None:
    wrong = replace(RUNS[1], series={**RUNS[1].series, name: [(1, 1.0, value)]})
    with pytest.raises(StorageError, match=rf"are invalid: .*{name}="):
        results_by_group([RUNS[0], wrong])


def test_the_most_extreme_values_of_runs_make_a_report_of_finite_numbers(tmp_path: Path) -> None:
    rates = {1: (1e-3, 1e9), 2: (1e9, 1e-3)}
    runs = [
        replace(
            run := finished(devices, seed, rate, accuracy=seed),
            metrics={**run.metrics, "time/train_seconds": rates[devices][1 - seed], "time/total_seconds": 0.0},
            series={"step/images_per_second": [(step, step, rates[devices][step % 2]) for step in range(30)]},
        )
        for devices, of_seeds in rates.items()
        for seed, rate in enumerate(of_seeds)
    ]
    for some in (runs, runs[::2]):
        study = Study.of(some)
        assert study is not None
        assert "nan" not in study.write(tmp_path)[0].read_text()
        assert Comparison.of(("A: old", "B: new"), some, some).write(tmp_path)


@pytest.mark.parametrize("name", ["target_accuracy", "price_per_hour"])
@pytest.mark.parametrize("value", ["abc", [1], {"a": 1}, math.nan, math.inf, -3])
def test_settings_of_a_strangers_sweep_that_are_none_are_told(name: str, value: object) -> None:
    runs = [replace(RUNS[0], params={f"report.{name}": value})]
    with pytest.raises(StorageError, match=rf"the settings of the sweep: report\.{name}=.*Set report\."):
        report_settings(runs, None, None)
    typed = report_settings(runs, 0.5, 2.0)
    assert (typed.target_accuracy, typed.price_per_hour) == (0.5, 2.0)


def test_settings_of_the_sweep_count_where_none_are_typed() -> None:
    runs = [replace(RUNS[0], params={"report.target_accuracy": "0.5", "report.price_per_hour": "None"})]
    assert report_settings(runs, None, None) == ReportSettings(0.5, None)
    assert report_settings(runs, 0.75, None) == ReportSettings(0.75, None)
    assert report_settings([], None, 1.5) == ReportSettings(None, 1.5)
