"""The speedup table has the medians and ratios that were computed by hand."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cifar_exp.config.schema import ReportSettings
from cifar_exp.study.finished_runs import grouped
from cifar_exp.study.group import Group
from cifar_exp.study.run_result import RunResult
from cifar_exp.study.speedup import SPEEDUP_ALONE, SpeedupRow

FIVE = [
    RunResult(devices=2, global_batch_size=512, images_per_second=300.0, train_seconds=60.0, test_accuracy=0.90),
    RunResult(devices=1, global_batch_size=256, images_per_second=200.0, train_seconds=110.0, test_accuracy=0.92),
    RunResult(devices=2, global_batch_size=512, images_per_second=400.0, train_seconds=50.0, test_accuracy=0.80),
    RunResult(devices=1, global_batch_size=256, images_per_second=100.0, train_seconds=100.0, test_accuracy=0.94),
    RunResult(devices=1, global_batch_size=256, images_per_second=900.0, train_seconds=130.0, test_accuracy=0.91),
]


def rows_of(results: Sequence[RunResult], report: ReportSettings = SPEEDUP_ALONE) -> Sequence[SpeedupRow]:
    return Group.of(results, report).rows


def test_rows_are_medians_over_repeats_in_ascending_device_count() -> None:
    """1 device: 100, 200, 900 images/s; 2 devices: 300, 400. A mean would be drawn away by the outlier."""
    assert [replace(row, intervals={}) for row in rows_of(FIVE)] == [
        SpeedupRow(
            devices=1,
            repeats=3,
            global_batch_size=256,
            images_per_second=200.0,
            speedup=1.0,
            efficiency=1.0,
            train_seconds=110.0,
            time_ratio=1.0,
            test_accuracy=0.92,
        ),
        SpeedupRow(
            devices=2,
            repeats=2,
            global_batch_size=512,
            images_per_second=350.0,
            speedup=1.75,
            efficiency=0.875,
            train_seconds=55.0,
            time_ratio=2.0,
            test_accuracy=pytest.approx(0.85),  # type: ignore[arg-type]
        ),
    ]


def test_speedup_is_relative_to_the_smallest_count() -> None:
    """From 2 to 6 devices, twice the rate: two thirds of the ideal three."""
    rows = rows_of([RunResult(6, 1536, 500.0, 20.0, 0.8), RunResult(2, 512, 250.0, 30.0, 0.9)])
    assert [(row.devices, row.speedup) for row in rows] == [(2, 1.0), (6, 2.0)]
    assert [row.efficiency for row in rows] == pytest.approx([1.0, 2 / 3])
    assert [row.time_ratio for row in rows] == [1.0, 1.5]


def test_time_and_rate_are_two_ratios() -> None:
    """A run whose steady rate doubles but whose training time does not get shorter, and one that gets slower."""
    rows = rows_of([RunResult(1, 256, 100.0, 10.0, 0.5), RunResult(2, 512, 200.0, 10.0, 0.5)])
    assert (rows[1].speedup, rows[1].time_ratio) == (2.0, 1.0)
    rows = rows_of([RunResult(1, 256, 100.0, 10.0, 0.5), RunResult(4, 256, 50.0, 20.0, 0.5)])
    assert (rows[1].speedup, rows[1].efficiency, rows[1].time_ratio) == (0.5, 0.125, 0.5)


def test_a_result_is_read_from_the_metrics_of_a_run() -> None:
    metrics = {
        "devices": 4.0,
        "global_batch_size": 1024.0,
        "images_per_second": 1.0,
        "steady_images_per_second": 1234.5,
        "time/train_seconds": 67.8,
        "time/total_seconds": 99.0,
        "test/accuracy": 0.9,
        "val/accuracy": 0.8,
    }
    result = RunResult.of(metrics)
    assert result == RunResult(4, 1024, 1234.5, 67.8, 0.9, total_seconds=99.0)
    assert isinstance(result.devices, int)


def test_a_result_knows_its_blocks_without_the_first_and_its_time_without_warm_up() -> None:
    series = {
        "step/images_per_second": [(10, 1.0, 100.0), (20, 1.5, 900.0), (30, 2.0, 1100.0)],
        "val/accuracy": [(15, 3.0, 0.3), (30, 6.0, 0.5)],
    }
    metrics = {"devices": 2, "global_batch_size": 512, "steady_images_per_second": 1000.0}
    result = RunResult.of(metrics | {"time/train_seconds": 20.0, "test/accuracy": 0.5}, series, {"heat": 1.0})
    assert result.block_rates == (900.0, 1100.0)
    assert result.steady_seconds == pytest.approx(30 * 512 / 1000)
    assert [result.seconds_to(accuracy) for accuracy in (0.2, 0.3, 0.31, 0.6)] == [3.0, 3.0, 6.0, None]
    assert result.disturbances == {"heat": 1.0}


def run(devices: int, rate: float, accuracy: float = 0.5, **more: object) -> RunResult:
    return RunResult(devices, 256 * devices, rate, 1000 / rate, accuracy, **more)  # type: ignore[arg-type]


def test_intervals_by_hand() -> None:
    """Logarithms 0.01 and 0.02 to each side of two runs a count: errors 0.01 and 0.02 with one degree of freedom each.

    Their difference has sqrt(0.0005) with 0.0005^2 / (0.0001^2 + 0.0004^2) = 1.47 degrees, for which t is 6.2.
    """
    off = [(1, 100, 0.01), (1, 100, -0.01), (2, 180, 0.02), (2, 180, -0.02)]
    first, second = Group.of([run(count, rate * math.exp(by)) for count, rate, by in off]).rows
    rate, reach = first.intervals["images_per_second"], math.exp(12.7062 * 0.01)
    assert (rate.low, rate.high) == pytest.approx((100 / reach, 100 * reach), rel=1e-4)
    assert "speedup" not in first.intervals  # it is what the others are compared with
    reach = math.exp(stats.t.ppf(0.975, 25 / 17) * math.sqrt(0.0005))
    for figure, value in (("speedup", 1.8), ("efficiency", 0.9), ("time_ratio", 1.8)):
        interval = second.intervals[figure]
        assert (interval.low, interval.high) == pytest.approx((value / reach, value * reach), rel=1e-3)


def test_a_count_with_one_run_has_no_interval_and_the_others_have_theirs() -> None:
    group = Group.of([run(1, 100), run(1, 101), run(2, 190), run(4, 370), run(4, 380)])
    assert "images_per_second" in group.rows[0].intervals
    assert group.rows[1].intervals == {}
    assert "speedup" in group.rows[2].intervals
    assert "no interval for the single runs at devices.count 2" in group.notes[0]
    assert [fit.interval for fit in group.fits] == [None, None]


def test_five_steady_blocks_of_one_seed_carry_no_interval() -> None:
    """They printed [nan%, nan%], and a gain of 1.70 within [2.00, 2.00]."""
    group = Group.of([run(1, 100, block_rates=(99.0, 101, 100, 98, 102)), run(2, 170, block_rates=(170.0,) * 5)])
    assert [(fit.interval, fit.gain_interval) for fit in group.fits] == [(None, None)] * 2
    assert "nan" not in " ".join([*map(str, group.fits), *group.notes])
    assert group.rows[1].intervals == {}


@given(
    rates=st.lists(st.lists(st.floats(1, 1e6), min_size=1, max_size=3), min_size=2, max_size=4),
    blocks=st.lists(st.floats(1, 1e6), max_size=30),
)
def test_intervals_contain_their_estimates(rates: list[list[float]], blocks: list[float]) -> None:
    group = Group.of(
        [run(2**place, rate, block_rates=tuple(blocks)) for place, sample in enumerate(rates) for rate in sample]
    )
    for row in group.rows:
        for name, interval in row.intervals.items():
            assert interval.low <= getattr(row, name) * (1 + 1e-9)
            assert interval.high >= getattr(row, name) * (1 - 1e-9)
    for fit in group.fits:
        assert fit.interval is None or fit.interval.low <= fit.serial_fraction <= fit.interval.high
        assert fit.gain_interval is None or fit.gain_interval.low <= fit.gain <= fit.gain_interval.high
        assert "nan" not in str(fit)


def test_single_runs_use_the_noise_of_their_blocks_and_note_it() -> None:
    def blocks(rate: float) -> tuple[float, ...]:
        return tuple(rate * (1 + 0.01 * (-1) ** (number // 3)) for number in range(16))

    group = Group.of([run(1, 100, block_rates=blocks(100)), run(2, 190, block_rates=blocks(190))])
    interval = group.rows[1].intervals["speedup"]
    assert 0.01 < interval.high - interval.low < 0.5
    assert interval.low < 1.9 < interval.high
    assert "another run" in group.notes[0]
    assert "test_accuracy" not in group.rows[1].intervals
    bare = Group.of([run(1, 100), run(2, 190)])
    assert bare.rows[1].intervals == {}
    assert bare.notes[0].startswith("no confidence intervals")
    assert "fewer than 10 steady blocks" in bare.notes[1]


def test_time_and_cost_to_the_target_accuracy() -> None:
    courses = {1: [[(60, 0.5), (120, 0.85)], [(60, 0.4), (140, 0.86)]], 2: [[(50, 0.5), (90, 0.85)], [(50, 0.5)]]}
    results = [run(n, 100, progress=course) for n, courses_of in courses.items() for course in courses_of]
    first, second = rows_of(results, ReportSettings(target_accuracy=0.85, price_per_hour=3.6))
    assert (first.reached, first.seconds_to_accuracy, first.device_seconds_to_accuracy) == (2, 130, 130)
    assert first.price_to_accuracy == pytest.approx(0.13)
    assert (second.reached, second.seconds_to_accuracy, second.device_seconds_to_accuracy) == (1, 90, 180)
    assert "seconds_to_accuracy" not in first.intervals  # one run never reached it: no interval of the others' time
    reached = rows_of(results[:3], ReportSettings(target_accuracy=0.5, price_per_hour=None))
    interval = reached[0].intervals["seconds_to_accuracy"]
    assert interval.low < reached[0].seconds_to_accuracy < interval.high  # type: ignore[operator]
    assert rows_of(results)[0].reached is None


def test_the_sentence_on_accuracy_names_its_test() -> None:
    def sentence(*accuracies: tuple[float, ...]) -> str:
        counts = [2**power for power in range(len(accuracies))]
        runs = [run(n, 100, a) for n, values in zip(counts, accuracies, strict=True) for a in values]
        return Group.of(runs).notes[-1]

    noisy = sentence((0.80, 0.82, 0.84), (0.82, 0.83, 0.84))
    assert noisy.startswith("test accuracy: +1.00 points on 2 devices against 1 (95 % interval -")
    assert "are within the noise of the seeds (Welch's analysis of variance, F(1, 2.94) = 0.6, p = 0.5)" in noisy
    worse = sentence((0.80, 0.82, 0.84), (0.81, 0.82, 0.83), (0.60, 0.62, 0.64))
    assert "-20.00 points on 4 devices against 1" in worse
    assert "go beyond the noise of the seeds" in worse
    assert "F(2, 3.56) = 105, p = 0.00069" in worse  # scipy.stats.f_oneway with equal_var=False
    assert "the noise is unknown" in sentence((0.8, 0.8), (0.9, 0.9))
    assert "noise of the seeds is unknown" in sentence((0.8,), (0.7,))
    assert sentence((0.8, 0.8, 0.8), (0.8, 0.8)).endswith("+0.00 points on 2 devices against 1: the same in all runs")


def test_disturbed_runs_are_counted_and_named() -> None:
    loads = [{}, {"others took {:.0%}": 0.2}, {"others took {:.0%}": 0.3}]
    runs = [run(count, 100 * count, disturbances=load) for count in (1, 2) for load in loads[: count + 1]]
    group = Group.of(runs)
    assert [row.disturbed for row in group.rows] == [1, 2]
    note = "DISTURBED: 1 of 2 runs on 1 device, 2 of 3 runs on 2 devices: others took 30% at worst"
    assert note in group.notes


def test_law_of_the_scaling_mode_comes_first() -> None:
    weak = Group.of([run(1, 100), run(2, 190)])
    strong = Group.of([RunResult(1, 256, 100, 10, 0.5), RunResult(2, 256, 190, 5, 0.5)])
    assert [fit.law for fit in weak.fits] == ["Gustafson", "Amdahl"]
    assert [fit.law for fit in strong.fits] == ["Amdahl", "Gustafson"]
    assert strong.fits[0].serial_fraction == pytest.approx(2 / 1.9 - 1)


def test_jobs_that_differ_in_devices_and_seed_alone_are_one_group_without_a_name() -> None:
    jobs = [["experiment=speedup", f"devices.count={n}", f"seed={seed}"] for n in (1, 2, 4) for seed in (0, 1)]
    assert grouped(jobs) == [""] * 6
    assert grouped([]) == []
    assert grouped([["devices.count=1", "train.epochs=2"]]) == [""]


def test_group_is_named_by_its_differing_values() -> None:
    jobs = [
        ["experiment=speedup", f"train.scaling={scaling}", f"devices.count={count}", "seed=0"]
        for scaling in ("weak", "strong")
        for count in (1, 2)
    ]
    assert grouped(jobs) == ["weak", "weak", "strong", "strong"]


def test_a_group_of_several_values_names_them_all_in_order() -> None:
    jobs = [
        ["train.scaling=weak", "model.width=16", "devices.count=1"],
        ["train.scaling=weak", "model.width=32", "devices.count=2"],
        ["train.scaling=strong", "model.width=16", "devices.count=1"],
    ]
    assert grouped(jobs) == ["weak 16", "weak 32", "strong 16"]
