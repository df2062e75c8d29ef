"""From measured runs to speedup over device counts: pure arithmetic, no store and no plots."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np

from cifar_exp.breakdown import PREFIXES, Breakdown
from cifar_exp.intervals import (
    Array,
    Interval,
    Means,
    block_error,
    f_probability,
    variance_ratio,
)
from cifar_exp.laws import Fit, fitted
from cifar_exp.schema import Report

NOT_GROUPING = ("devices.count", "seed")  # the axis of the study, and its repeats
ENOUGH_BLOCKS = 10  # steady ones, a run
SIGNIFICANT = 0.05
NOTHING_MORE = Report()
Sample = tuple[int, float, float]  # step, seconds since the start of the run, value


@dataclass(frozen=True)
class RunResult:
    """What one finished run contributes to a scaling study.

    Attributes:
        devices: number of ranks that trained.
        global_batch_size: images a step over all ranks.
        images_per_second: steady-state training rate over all ranks.
        train_seconds: time spent training, evaluation excluded.
        test_accuracy: 0 to 1.
        total_seconds: of the whole run, start-up, compilation and evaluation included; None where not known.
        steady_seconds: of its training steps at the steady rate, without any warm-up; None where not known.
        block_rates: images/s of each block of ``train.log_every`` steps but the first, the warm-up.
        progress: seconds since the start and validation accuracy, after each epoch.
        disturbances: what disturbed it: sentences with a place for how much, and how much.
        steps: that it trained; None where not known.
        times: the metrics that say where its time went.
    """

    devices: int
    global_batch_size: int
    images_per_second: float
    train_seconds: float
    test_accuracy: float
    total_seconds: float | None = None
    steady_seconds: float | None = None
    block_rates: Sequence[float] = ()
    progress: Sequence[tuple[float, float]] = ()
    disturbances: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None
    times: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        metrics: Mapping[str, float],
        series: Mapping[str, Sequence[Sample]] | None = None,
        disturbances: Mapping[str, float] | None = None,
    ) -> "RunResult":
        """From the last values of a finished run's metrics, and the course of some of them."""
        blocks = (series or {}).get("step/images_per_second", ())
        epochs = (series or {}).get("val/accuracy", ())
        images = epochs[-1][0] * metrics["global_batch_size"] if epochs else None
        return cls(
            devices=int(metrics["devices"]),
            global_batch_size=int(metrics["global_batch_size"]),
            images_per_second=metrics["steady_images_per_second"],
            train_seconds=metrics["time/train_seconds"],
            test_accuracy=metrics["test/accuracy"],
            total_seconds=metrics.get("time/total_seconds"),
            steady_seconds=images / metrics["steady_images_per_second"] if images else None,
            block_rates=tuple(rate for _, _, rate in blocks[1:]),
            progress=tuple((seconds, accuracy) for _, seconds, accuracy in epochs),
            disturbances=disturbances or {},
            steps=epochs[-1][0] if epochs else None,
            times={name: value for name, value in metrics.items() if name.startswith(PREFIXES)},
        )

    def seconds_to(self, accuracy: float) -> float | None:
        """Seconds from the start to the first validation of at least ``accuracy``; None where it was not reached."""
        return next((seconds for seconds, reached in self.progress if reached >= accuracy), None)


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


@dataclass(frozen=True)
class Group:
    """Runs that differ in their device count and their seed alone.

    Attributes:
        rows: one a device count, in ascending order.
        fits: Amdahl's and Gustafson's law beside the rates; the one that is made for the group's way of scaling first.
            None with less than two counts.
        notes: what a reader has to know to believe the figures, in sentences.
        breakdowns: where the time went, one a device count; those whose runs do not say are left out.
    """

    rows: Sequence[SpeedupRow]
    fits: Sequence[Fit]
    notes: Sequence[str]
    breakdowns: Sequence[Breakdown] = ()

    @classmethod
    def of(cls, results: Sequence[RunResult], report: Report = NOTHING_MORE) -> "Group":
        """The study of one group. ``report``: what to work out beside the speedup."""
        repeats = by_count(results)
        rates = log_means(repeats, lambda result: result.images_per_second)
        rows = _rows(repeats, rates, report)
        fits = []
        if len(rows) > 1:
            same_work = rows[0].global_batch_size == rows[-1].global_batch_size
            fits = [fitted(law, list(repeats), rates) for law in ("Amdahl", "Gustafson")][:: 1 if same_work else -1]
        breakdowns = [
            found
            for count, runs in repeats.items()
            if (found := Breakdown.of(count, [run.times for run in runs], runs[0].steps))
        ]
        notes = [*_notes(repeats, rates), *(note for breakdown in breakdowns for note in breakdown.notes)]
        return cls(rows, fits, notes, breakdowns)


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


def _notes(repeats: Mapping[int, Sequence[RunResult]], rates: Means) -> list[str]:
    few = {count: fewest for count, fewest in _blocks(repeats).items() if fewest < ENOUGH_BLOCKS}
    notes = [_interval_note(repeats, rates)]
    if few:
        told = ", ".join(f"{fewest} on {count} {_devices(count)}" for count, fewest in few.items())
        notes.append(
            f"fewer than {ENOUGH_BLOCKS} steady blocks of train.log_every steps a run: {told}. Type a larger "
            f"train.epochs or a smaller train.log_every"
        )
    notes += _disturbance_notes(repeats)
    if len(repeats) > 1:
        notes.append(accuracy_sentence(repeats))
    return notes


def _disturbance_notes(repeats: Mapping[int, Sequence[RunResult]]) -> list[str]:
    """A sentence for each kind: how many runs at which counts, and the worst of them."""
    runs = {count: [result.disturbances for result in results] for count, results in repeats.items()}
    notes = []
    for text in dict.fromkeys(text for disturbed in runs.values() for found in disturbed for text in found):
        shares = {count: [found[text] for found in disturbed if text in found] for count, disturbed in runs.items()}
        told = [
            f"{len(values)} of {len(repeats[count])} runs on {count} {_devices(count)}"
            for count, values in shares.items()
            if values
        ]
        worst = max(value for values in shares.values() for value in values)
        notes.append(f"DISTURBED: {', '.join(told)}: {text.format(worst)} at worst")
    return notes


def _blocks(repeats: Mapping[int, Sequence[RunResult]]) -> dict[int, int]:
    return {count: min(len(result.block_rates) for result in results) for count, results in repeats.items()}


def _interval_note(repeats: Mapping[int, Sequence[RunResult]], rates: Means) -> str:
    if any(len(results) > 1 for results in repeats.values()):
        runs = "/".join(str(number) for number in dict.fromkeys(len(results) for results in repeats.values()))
        return (
            f"95 % intervals: Student's t over {runs} runs a device count, their relative noise pooled over the counts "
            f"({rates.freedom:.0f} degrees of freedom)"
        )
    if rates.freedom:
        return (
            "95 % intervals come from blocks of steps within one run a device count (block bootstrap): how far off "
            "another run would be is not in them. Type seed=0,1,2"
        )
    return "no intervals: one run a device count, and too few blocks of steps in it. Type seed=0,1,2"


def accuracy_sentence(repeats: Mapping[int, Sequence[RunResult]]) -> str:
    """What more devices cost in test accuracy, and whether that is within the noise of the seeds."""
    smallest, largest = min(repeats), max(repeats)
    accuracies = accuracy_means(repeats)
    points = round(100 * float(accuracies.values[-1] - accuracies.values[0]), 2) + 0.0  # no minus zero
    subject = f"test accuracy: {points:+.2f} points on {largest} devices against {smallest}"
    samples = [[result.test_accuracy for result in results] for results in repeats.values()]
    if not accuracies.freedom:
        return f"{subject}; whether that is within the noise of the seeds one run a count cannot tell. Type seed=0,1,2"
    ratio, between, within = variance_ratio(samples)
    if math.isnan(ratio):
        return f"{subject}: the same in all runs"
    ends = np.eye(len(repeats))[-1] - np.eye(len(repeats))[0]
    interval = accuracies.interval(ends)
    assert interval
    probability = f_probability(ratio, between, within)
    verdict = "are within" if probability >= SIGNIFICANT else "go beyond"
    return (
        f"{subject} (95 % interval {100 * interval.low:+.2f} to {100 * interval.high:+.2f}); the differences between "
        f"the device counts {verdict} the noise of the seeds (one-way analysis of variance, "
        f"F({between:.0f}, {within:.0f}) = {ratio:.3g}, p = {probability:.2g})"
    )


def _devices(count: int) -> str:
    return "device" if count == 1 else "devices"


def grouped(overrides: Sequence[Sequence[str]]) -> list[str]:
    """The group of each job of a sweep: the values that tell it apart, but for its device count and its seed.

    Args:
        overrides: the overrides of each job, as in ``["train.scaling=strong", "devices.count=2", "seed=0"]``.

    Returns:
        A name for each job, such as ``strong``; empty where nothing else differs.
    """
    rest = [
        [override for override in job if override.split("=")[0].lstrip("+") not in NOT_GROUPING] for job in overrides
    ]
    common = set.intersection(*(set(job) for job in rest)) if rest else set()
    return [" ".join(override.partition("=")[2] for override in job if override not in common) for job in rest]
