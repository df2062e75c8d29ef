"""Speedup inside one host and between hosts, for a sweep over ``launcher.hosts``."""

import math
import re
from collections.abc import Mapping, Sequence
from statistics import median

from cifar_exp.study.intervals import difference
from cifar_exp.study.report_page import Section
from cifar_exp.study.run_result import RunResult
from cifar_exp.study.speedup import by_count, log_means_or_blocks

HOSTS = re.compile(r"\s*\b(\d+) hosts?\b\s*")
HEADINGS = ["hosts", "devices", "images/s", "times the first row", "95 %"]


def hosts_sections(results: Mapping[str, Sequence[RunResult]]) -> list[Section]:
    """A table for each group of runs that differ only in hosts, devices and seed; none if all have equal hosts.

    Args:
        results: of each group, whose name has the settings in which groups differ.
    """
    families: dict[str, dict[int, Sequence[RunResult]]] = {}
    for name, runs in results.items():
        if found := HOSTS.search(name):
            families.setdefault(HOSTS.sub(" ", name).strip(), {})[int(found[1])] = runs
    return [
        (f"Inside one host and between hosts{f': {name}' if name else ''}", [HEADINGS, *_rows(family)], _notes(family))
        for name, family in families.items()
        if len(family) > 1
    ]


def _rows(family: Mapping[int, Sequence[RunResult]]) -> list[list[str]]:
    """Throughput relative to the smallest device count on the fewest hosts."""
    rows, first = list[list[str]](), None
    for hosts in sorted(family):
        repeats = by_count(family[hosts])
        means = log_means_or_blocks(repeats, lambda result: result.images_per_second)
        for place, (devices, runs) in enumerate(repeats.items()):
            rate = median(run.images_per_second for run in runs)
            estimate = means.sum([float(place == other) for other in range(len(repeats))])
            first = first or (rate, estimate)
            gain = difference(first[1], estimate) if rows else None
            interval = gain.interval().mapped(math.exp).around(rate / first[0]) if gain else None
            between = f"{interval.low:.2f} to {interval.high:.2f}" if interval else ""
            rows.append([str(hosts), str(devices), f"{rate:,.0f}", f"{rate / first[0]:.2f}", between])
    return rows


def _notes(family: Mapping[int, Sequence[RunResult]]) -> list[str]:
    """What an all-reduce costs on each kind of link, from the runs on the most devices and hosts."""
    hosts = max(family)
    runs = list(by_count(family[hosts]).values())[-1]
    lines = []
    for name, where in {"inside_a_host": "inside a host", "between_hosts": "between hosts"}.items():
        key = f"communication/{name}/"
        known = [run.times for run in runs if f"{key}bytes_per_second" in run.times]
        if known:
            rate = median(times[f"{key}bytes_per_second"] for times in known)
            seconds = median(times[f"{key}seconds_per_step"] for times in known)
            sent = median(times["communication/bytes_per_step"] for times in known)
            lines.append(
                f"{where}: a rank sends {sent / 1e6:.3g} MB per step; the link carries {rate / 1e9:.3g} GB/s, so that "
                f"takes {1000 * seconds:.3g} ms ({runs[0].devices} devices on {hosts} hosts)"
            )
    return lines
