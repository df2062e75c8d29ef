"""The speedup table is the medians and ratios that one computes by hand."""

import pytest

from cifar_exp.scaling import RunResult, SpeedupRow, grouped, speedup_rows

FIVE = [
    RunResult(devices=2, global_batch_size=512, images_per_second=300.0, train_seconds=60.0, test_accuracy=0.90),
    RunResult(devices=1, global_batch_size=256, images_per_second=200.0, train_seconds=110.0, test_accuracy=0.92),
    RunResult(devices=2, global_batch_size=512, images_per_second=400.0, train_seconds=50.0, test_accuracy=0.80),
    RunResult(devices=1, global_batch_size=256, images_per_second=100.0, train_seconds=100.0, test_accuracy=0.94),
    RunResult(devices=1, global_batch_size=256, images_per_second=900.0, train_seconds=130.0, test_accuracy=0.91),
]


def test_rows_are_medians_over_repeats_in_ascending_device_count() -> None:
    """1 device: 100, 200, 900 images/s; 2 devices: 300, 400. A mean would be drawn away by the outlier."""
    assert speedup_rows(FIVE) == [
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


def test_speedup_is_over_the_smallest_count_where_that_is_not_one() -> None:
    """From 2 to 6 devices, twice the rate: two thirds of the ideal three."""
    rows = speedup_rows([RunResult(6, 1536, 500.0, 20.0, 0.8), RunResult(2, 512, 250.0, 30.0, 0.9)])
    assert [(row.devices, row.speedup) for row in rows] == [(2, 1.0), (6, 2.0)]
    assert [row.efficiency for row in rows] == pytest.approx([1.0, 2 / 3])
    assert [row.time_ratio for row in rows] == [1.0, 1.5]


def test_time_and_rate_are_two_ratios() -> None:
    """A run whose steady rate doubles but whose training time does not get shorter, and one that gets slower."""
    rows = speedup_rows([RunResult(1, 256, 100.0, 10.0, 0.5), RunResult(2, 512, 200.0, 10.0, 0.5)])
    assert (rows[1].speedup, rows[1].time_ratio) == (2.0, 1.0)
    rows = speedup_rows([RunResult(1, 256, 100.0, 10.0, 0.5), RunResult(4, 256, 50.0, 20.0, 0.5)])
    assert (rows[1].speedup, rows[1].efficiency, rows[1].time_ratio) == (0.5, 0.125, 0.5)


def test_no_results_make_no_rows() -> None:
    assert speedup_rows([]) == []


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
    assert result == RunResult(4, 1024, 1234.5, 67.8, 0.9)
    assert isinstance(result.devices, int)


def test_jobs_that_differ_in_devices_and_seed_alone_are_one_group_without_a_name() -> None:
    jobs = [["experiment=speedup", f"devices.count={n}", f"seed={seed}"] for n in (1, 2, 4) for seed in (0, 1)]
    assert grouped(jobs) == [""] * 6
    assert grouped([]) == []
    assert grouped([["devices.count=1", "train.epochs=2"]]) == [""]


def test_a_group_is_named_by_the_values_that_tell_it_apart() -> None:
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
