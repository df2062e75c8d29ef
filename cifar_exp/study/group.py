"""Compute speedup rows, fitted laws and notes from the runs of one group. No files and no MLflow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cifar_exp.config.schema import ReportSettings
from cifar_exp.study.intervals import Means
from cifar_exp.study.laws import Fit, fitted
from cifar_exp.study.run_result import RunResult
from cifar_exp.study.speedup import (
    SPEEDUP_ALONE,
    SpeedupRow,
    accuracy_means,
    by_count,
    log_means_or_blocks,
    speedup_rows,
)
from cifar_exp.study.time_breakdown import Breakdown
from cifar_exp.training.throughput import ENOUGH_BLOCKS

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their device count and their seed.

    Attributes:
        rows: one per device count, in ascending order.
        fits: Amdahl's and Gustafson's law; the one for the group's way of scaling comes first. Empty with less than two
            device counts.
        notes: sentences about the reliability of the figures.
        breakdowns: time breakdowns, one per device count; counts without time metrics are left out.
    """

    rows: Sequence[SpeedupRow]
    fits: Sequence[Fit]
    notes: Sequence[str]
    breakdowns: Sequence[Breakdown] = ()

    @classmethod
    def of(cls, results: Sequence[RunResult], report: ReportSettings = SPEEDUP_ALONE) -> "Group":
        """The study of one group. ``report``: what to compute in addition to the speedup."""
        repeats = by_count(results)
        log_rates = log_means_or_blocks(repeats, lambda result: result.images_per_second)
        rows = speedup_rows(repeats, log_rates, report)
        fits = []
        if len(rows) > 1:
            same_work = rows[0].global_batch_size == rows[-1].global_batch_size
            fits = [fitted(law, list(repeats), log_rates) for law in ("Amdahl", "Gustafson")][:: 1 if same_work else -1]
        breakdowns = [
            found
            for count, runs in repeats.items()
            if (found := Breakdown.of(count, [run.times for run in runs], runs[0].steps))
        ]
        notes = [*_notes(repeats, log_rates), *(note for breakdown in breakdowns for note in breakdown.notes)]
        return cls(rows, fits, notes, breakdowns)


def _notes(repeats: Mapping[int, Sequence[RunResult]], log_rates: Means) -> list[str]:
    few = {count: fewest for count, fewest in _blocks(repeats).items() if fewest < ENOUGH_BLOCKS}
    notes = [_interval_note(repeats, log_rates)]
    if few:
        counts = ", ".join(f"{fewest} on {count} {_devices(count)}" for count, fewest in few.items())
        notes.append(
            f"fewer than {ENOUGH_BLOCKS} steady blocks of train.log_every steps per run: {counts}. Set a larger "
            f"train.epochs or a smaller train.log_every"
        )
    notes += _disturbance_notes(repeats)
    if len(repeats) > 1:
        notes.append(accuracy_sentence(repeats))
    return notes


def _disturbance_notes(repeats: Mapping[int, Sequence[RunResult]]) -> list[str]:
    """A sentence for each kind of disturbance: the number of runs by device count, and the worst of them."""
    runs = {count: [result.disturbances for result in results] for count, results in repeats.items()}
    notes = []
    for text in dict.fromkeys(text for disturbed in runs.values() for found in disturbed for text in found):
        shares = {count: [found[text] for found in disturbed if text in found] for count, disturbed in runs.items()}
        runs_of_counts = [
            f"{len(values)} of {len(repeats[count])} runs on {count} {_devices(count)}"
            for count, values in shares.items()
            if values
        ]
        worst = max(value for values in shares.values() for value in values)
        notes.append(f"DISTURBED: {', '.join(runs_of_counts)}: {text.format(worst)} at worst")
    return notes


def _blocks(repeats: Mapping[int, Sequence[RunResult]]) -> dict[int, int]:
    return {count: min(len(result.block_rates) for result in results) for count, results in repeats.items()}


def _interval_note(repeats: Mapping[int, Sequence[RunResult]], log_rates: Means) -> str:
    if any(len(results) > 1 for results in repeats.values()):
        runs = "/".join(str(number) for number in dict.fromkeys(len(results) for results in repeats.values()))
        single = [str(count) for count, results in repeats.items() if len(results) == 1]
        unknown = f"; no interval for the single runs at devices.count {', '.join(single)}" if single else ""
        return (
            f"95 % intervals: Student's t over {runs} runs per device count, with a separate variance for each (Welch)"
            f"{unknown}"
        )
    if any(log_rates.freedoms):
        return (
            "noise between runs unknown: 95 % intervals come from blocks of steps within the single run per device "
            "count (block bootstrap); another run may differ more. Set seed=0,1,2"
        )
    return "no confidence intervals: a single run per device count, with too few blocks of steps. Set seed=0,1,2"


def accuracy_sentence(repeats: Mapping[int, Sequence[RunResult]]) -> str:
    """The change of test accuracy with more devices, and whether it is within the noise of the seeds."""
    smallest, largest = min(repeats), max(repeats)
    accuracies = accuracy_means(repeats)
    points = round(100 * float(accuracies.values[-1] - accuracies.values[0]), 2) + 0.0  # no minus zero
    subject = f"test accuracy: {points:+.2f} points on {largest} devices against {smallest}"
    samples = [[result.test_accuracy for result in results] for results in repeats.values()]
    if min(map(len, samples)) == 1:
        return f"{subject}; with one run per device count the noise of the seeds is unknown. Set seed=0,1,2"
    if len({accuracy for sample in samples for accuracy in sample}) == 1:
        return f"{subject}: the same in all runs"
    others_minus_first = np.column_stack([-np.ones(len(samples) - 1), np.eye(len(samples) - 1)])
    change = accuracies.sum(others_minus_first[-1])
    test = accuracies.deviation(others_minus_first, others_minus_first @ accuracies.values)
    if not (change and test):
        return f"{subject}; all seeds of a device count have the same accuracy, so the noise is unknown. Set more seeds"
    interval = change.interval()
    verdict = "are within" if test.probability >= SIGNIFICANT else "go beyond"
    return (
        f"{subject} (95 % interval {100 * interval.low:+.2f} to {100 * interval.high:+.2f}); the differences between "
        f"the device counts {verdict} the noise of the seeds (Welch's analysis of variance, "
        f"F({test.between}, {test.within:.3g}) = {test.ratio:.3g}, p = {test.probability:.2g})"
    )


def _devices(count: int) -> str:
    return "device" if count == 1 else "devices"
