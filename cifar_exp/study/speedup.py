"""Speedup, efficiency and cost by device count, with their intervals."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np

from cifar_exp.config.schema import Report
from cifar_exp.study.intervals import Array, Interval, Means, block_error
from cifar_exp.study.run_result import RunResult

NOTHING_MORE = Report()


@dataclass(frozen=True)
class SpeedupRow:
    """Medians over the repeats at one device count, beside the smallest count of the group.

    Attributes:
        devices: number of ranks.
        repeats: runs behind the medians.
        global_batch_size: images a step over all ranks.
        images_per_second: median steady-state rate.
        speedup: rate over that of the smallest count in the group.
        efficiency: speedup over the ratio of the device counts.
        train_seconds: median training time.
        time_ratio: training time of the smallest count over this one's.
        test_accuracy: median, 0 to 1.
        steady_seconds: median time of the training steps at the steady rate; None where not known.
        total_seconds: median time of whole runs, with warm-up, compilation and evaluation; None where not known.
        blocks: steady blocks of steps in the run that has the fewest.
        disturbed: runs that were disturbed.
        reached: runs that reached ``report.target_accuracy``; None without one.
        seconds_to_accuracy: median time to it of the runs that did, from the start; None where none did.
        device_seconds_to_accuracy: that time on all devices together.
        price_to_accuracy: what that costs at ``report.price_per_hour``.
        intervals: 95 % intervals by the name of the figure, where they are known.
    """

    devices: int
    repeats: int
    global_batch_size: int
    images_per_second: float
    speedup: float
    efficiency: float
    train_seconds: float
    time_ratio: float
    test_accuracy: float
    steady_seconds: float | None = None
    total_seconds: float | None = None
    blocks: int = 0
    disturbed: int = 0
    reached: int | None = None
    seconds_to_accuracy: float | None = None
    device_seconds_to_accuracy: float | None = None
    price_to_accuracy: float | None = None
    intervals: Mapping[str, Interval] = field(default_factory=dict)


# The figures of a row that may have an interval, in the order of the table's columns.
UNCERTAIN = (
    "images_per_second",
    "speedup",
    "efficiency",
    "train_seconds",
    "time_ratio",
    "test_accuracy",
    "seconds_to_accuracy",
)


def by_count(results: Sequence[RunResult]) -> dict[int, list[RunResult]]:
    """The results at each device count, in ascending order."""
    counts = sorted({result.devices for result in results})
    return {count: [result for result in results if result.devices == count] for count in counts}


def log_means(repeats: Mapping[int, Sequence[RunResult]], value: Callable[[RunResult], float]) -> Means:
    """Means of the logarithms of a rate or a time at each count: noise is relative, and ratios become differences.

    Where no count has repeats, the errors are those of the median of the blocks within each run.
    """
    means = Means.of([[math.log(value(result)) for result in results] for results in repeats.values()])
    if means.freedom or not repeats:
        return means
    errors = [block_error([math.log(rate) for rate in only.block_rates]) for (only,) in repeats.values()]
    return Means(means.values, np.array([error for error, _ in errors]), min(freedom for _, freedom in errors))


def accuracy_means(repeats: Mapping[int, Sequence[RunResult]]) -> Means:
    """Means of the test accuracy at each count."""
    return Means.of([[result.test_accuracy for result in results] for results in repeats.values()])


def speedup_rows(results: Sequence[RunResult], report: Report = NOTHING_MORE) -> list[SpeedupRow]:
    """One row a device count, in ascending order, against the smallest count in ``results``."""
    repeats = by_count(results)
    return _rows(repeats, log_means(repeats, lambda result: result.images_per_second), report)


def _rows(repeats: Mapping[int, Sequence[RunResult]], log_rates: Means, report: Report) -> list[SpeedupRow]:
    rows: list[SpeedupRow] = []
    log_times = log_means(repeats, lambda result: result.train_seconds)
    accuracies = accuracy_means(repeats)
    places = np.eye(len(repeats))
    for place, (count, results) in enumerate(repeats.items()):
        rate = median(result.images_per_second for result in results)
        seconds = median(result.train_seconds for result in results)
        accuracy = median(result.test_accuracy for result in results)
        first = rows[0] if rows else None
        speedup = rate / first.images_per_second if first else 1.0
        share = rows[0].devices / count if rows else 1.0
        time_ratio = first.train_seconds / seconds if first else 1.0
        gain, shorter = places[place] - places[0], places[0] - places[place]
        intervals = {
            "images_per_second": _ratio_interval(log_rates, places[place], rate),
            "speedup": _ratio_interval(log_rates, gain, speedup) if first else None,
            "train_seconds": _ratio_interval(log_times, places[place], seconds),
            "time_ratio": _ratio_interval(log_times, shorter, time_ratio) if first else None,
            "test_accuracy": _held(accuracies.interval(places[place]), accuracy),
        }
        intervals["efficiency"] = _scaled(intervals["speedup"], share)
        row = SpeedupRow(
            devices=count,
            repeats=len(results),
            global_batch_size=results[0].global_batch_size,
            images_per_second=rate,
            speedup=speedup,
            efficiency=speedup * share,
            train_seconds=seconds,
            time_ratio=time_ratio,
            test_accuracy=accuracy,
            steady_seconds=_median_of([result.steady_seconds for result in results]),
            total_seconds=_median_of([result.total_seconds for result in results]),
            blocks=min(len(result.block_rates) for result in results),
            disturbed=sum(bool(result.disturbances) for result in results),
            intervals={name: interval for name, interval in intervals.items() if interval}
            | _cost_interval(repeats, place, report),
        )
        rows.append(_with_cost(row, results, report))
    return rows


def _ratio_interval(means: Means, weights: Array, value: float) -> Interval | None:
    """The interval of what is a sum of logarithms, wide enough to hold the median that is shown beside it."""
    interval = means.interval(weights)
    return _held(interval.mapped(math.exp) if interval else None, value)


def _held(interval: Interval | None, value: float) -> Interval | None:
    return interval.around(value) if interval else None


def _scaled(interval: Interval | None, factor: float) -> Interval | None:
    return interval.mapped(lambda value: value * factor) if interval else None


def _median_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _with_cost(row: SpeedupRow, results: Sequence[RunResult], report: Report) -> SpeedupRow:
    """The row with what it took to reach ``report.target_accuracy``; as it is without one."""
    if report.target_accuracy is None:
        return row
    times = [result.seconds_to(report.target_accuracy) for result in results]
    seconds = _median_of(times)
    row = replace(row, reached=sum(time is not None for time in times), seconds_to_accuracy=seconds)
    if seconds is None:
        return row
    price = seconds * row.devices / 3600 * report.price_per_hour if report.price_per_hour else None
    return replace(row, device_seconds_to_accuracy=seconds * row.devices, price_to_accuracy=price)


def _cost_interval(repeats: Mapping[int, Sequence[RunResult]], place: int, report: Report) -> dict[str, Interval]:
    """Of the time to the accuracy, over the repeats; only where every run reached it, or the slow ones were missing."""
    target = report.target_accuracy
    if target is None or any(result.seconds_to(target) is None for results in repeats.values() for result in results):
        return {}
    times = [[result.seconds_to(target) or math.nan for result in results] for results in repeats.values()]
    means = Means.of([[math.log(time) for time in sample] for sample in times])
    interval = _ratio_interval(means, np.eye(len(times))[place], median(times[place]))
    return {"seconds_to_accuracy": interval} if interval else {}
