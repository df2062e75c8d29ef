"""Speedup, efficiency and cost by device count, with their intervals."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np

from cifar_exp.config.schema import ReportSettings
from cifar_exp.study.intervals import Array, Estimate, Interval, Means, block_error
from cifar_exp.study.run_result import RunResult

SPEEDUP_ALONE = ReportSettings(target_accuracy=None, price_per_hour=None)


@dataclass(frozen=True)
class SpeedupRow:
    """Medians over the repeats at one device count, relative to the smallest count of the group.

    Attributes:
        devices: number of ranks.
        repeats: number of runs.
        global_batch_size: images per step over all ranks.
        images_per_second: median steady-state throughput.
        speedup: throughput / throughput of the smallest count in the group.
        efficiency: speedup / ratio of the device counts.
        train_seconds: median training time.
        time_ratio: training time of the smallest count / training time.
        test_accuracy: median, 0 to 1.
        steady_seconds: median time of the training steps at steady-state throughput; None if unknown.
        total_seconds: median time of whole runs, with warm-up, compilation and evaluation; None if unknown.
        blocks: the smallest number of steady-state blocks of steps in a run.
        disturbed: number of disturbed runs.
        reached: runs that reached ``report.target_accuracy``; None without one.
        seconds_to_accuracy: median time from the start to that accuracy over these runs; None if none reached it.
        device_seconds_to_accuracy: that time multiplied by the number of devices.
        price_to_accuracy: the price of these device-seconds at ``report.price_per_hour``.
        intervals: the known 95 % intervals, by name of the quantity.
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


# The quantities of a row that can have an interval, in the order of the CSV's columns.
WITH_INTERVAL = (
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
    """Means of the logarithms of a quantity at each count. Noise is relative, and ratios become differences."""
    return Means.of([[math.log(value(result)) for result in results] for results in repeats.values()])


def log_means_or_blocks(repeats: Mapping[int, Sequence[RunResult]], value: Callable[[RunResult], float]) -> Means:
    """Like :func:`log_means`. Where no count has repeats, errors are those of the median over a run's blocks."""
    means = log_means(repeats, value)
    if any(means.freedoms):
        return means
    errors = [block_error([math.log(rate) for rate in only.block_rates]) for (only,) in repeats.values()]
    return Means(means.values, np.array([error for error, _ in errors]), np.array([freedom for _, freedom in errors]))


def accuracy_means(repeats: Mapping[int, Sequence[RunResult]]) -> Means:
    """Means of the test accuracy at each count."""
    return Means.of([[result.test_accuracy for result in results] for results in repeats.values()])


def speedup_rows(
    repeats: Mapping[int, Sequence[RunResult]], log_rates: Means, report: ReportSettings
) -> list[SpeedupRow]:
    """One row per device count, in ascending order, relative to the smallest count.

    Args:
        repeats: the results by device count, as from :func:`by_count`.
        log_rates: means of the logarithms of their throughput.
        report: what to compute in addition to the speedup.
    """
    rows: list[SpeedupRow] = []
    for place, (count, results) in enumerate(repeats.items()):
        row = _medians(count, results, first=rows[0] if rows else None)
        intervals = _intervals(row, place, repeats, log_rates) | _cost_interval(repeats, place, report)
        rows.append(_with_cost(replace(row, intervals=intervals), results, report))
    return rows


def _medians(count: int, results: Sequence[RunResult], first: SpeedupRow | None) -> SpeedupRow:
    """The row of one device count without intervals. ``first``: the smallest count's row; None if it is this one."""
    rate = median(result.images_per_second for result in results)
    seconds = median(result.train_seconds for result in results)
    speedup = rate / first.images_per_second if first else 1.0
    return SpeedupRow(
        devices=count,
        repeats=len(results),
        global_batch_size=results[0].global_batch_size,
        images_per_second=rate,
        speedup=speedup,
        efficiency=speedup * (first.devices / count if first else 1.0),
        train_seconds=seconds,
        time_ratio=first.train_seconds / seconds if first else 1.0,
        test_accuracy=median(result.test_accuracy for result in results),
        steady_seconds=_median_of([result.steady_seconds for result in results]),
        total_seconds=_median_of([result.total_seconds for result in results]),
        blocks=min(len(result.block_rates) for result in results),
        disturbed=sum(bool(result.disturbances) for result in results),
    )


def _intervals(
    row: SpeedupRow, place: int, repeats: Mapping[int, Sequence[RunResult]], log_rates: Means
) -> dict[str, Interval]:
    """The known 95 % intervals of a row. ``place``: its position among the device counts."""
    log_times = log_means_or_blocks(repeats, lambda result: result.train_seconds)
    units = np.eye(len(repeats))
    own, gain = units[place], units[place] - units[0]
    speedup = _ratio_interval(log_rates, gain, row.speedup) if place else None
    share = row.efficiency / row.speedup
    intervals = {
        "images_per_second": _ratio_interval(log_rates, own, row.images_per_second),
        "speedup": speedup,
        "efficiency": speedup.mapped(lambda value: value * share) if speedup else None,
        "train_seconds": _ratio_interval(log_times, own, row.train_seconds),
        "time_ratio": _ratio_interval(log_times, -gain, row.time_ratio) if place else None,
        "test_accuracy": _holding(accuracy_means(repeats).sum(own), row.test_accuracy),
    }
    return {name: interval for name, interval in intervals.items() if interval}


def _ratio_interval(means: Means, weights: Array, value: float) -> Interval | None:
    """The interval of a sum of logarithms as a ratio, widened to contain the median that is shown with it."""
    estimate = means.sum(weights)
    return estimate.interval().mapped(math.exp).around(value) if estimate else None


def _holding(estimate: Estimate | None, value: float) -> Interval | None:
    return estimate.interval().around(value) if estimate else None


def _median_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _with_cost(row: SpeedupRow, results: Sequence[RunResult], report: ReportSettings) -> SpeedupRow:
    """The row with time and price of reaching ``report.target_accuracy``; unchanged without a target."""
    if report.target_accuracy is None:
        return row
    times = [result.seconds_to(report.target_accuracy) for result in results]
    seconds = _median_of(times)
    row = replace(row, reached=sum(time is not None for time in times), seconds_to_accuracy=seconds)
    if seconds is None:
        return row
    price = seconds * row.devices / 3600 * report.price_per_hour if report.price_per_hour else None
    return replace(row, device_seconds_to_accuracy=seconds * row.devices, price_to_accuracy=price)


def _cost_interval(
    repeats: Mapping[int, Sequence[RunResult]], place: int, report: ReportSettings
) -> dict[str, Interval]:
    """The interval of the time to the accuracy. Only if every run reached it: else slow runs would be missing."""
    target = report.target_accuracy
    if target is None or any(result.seconds_to(target) is None for results in repeats.values() for result in results):
        return {}
    times = [[result.seconds_to(target) or math.nan for result in results] for results in repeats.values()]
    means = Means.of([[math.log(time) for time in sample] for sample in times])
    interval = _ratio_interval(means, np.eye(len(times))[place], median(times[place]))
    return {"seconds_to_accuracy": interval} if interval else {}
