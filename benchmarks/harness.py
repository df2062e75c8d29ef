"""Paired measurements: arms alternate in one run, each round gives a ratio, and other load is measured.

Machines are noisy and shared: quote the ratio and its interval, not a single time.
"""

import argparse
import json
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import psutil
import torch

from cifar_exp.system.load_watch import BUSY, LoadMeter, own_cpu_seconds

__all__ = ["Comparison", "Figure", "Goal", "LoadMeter", "arguments", "compare", "compare_all", "publish"]

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "numba", "lightning", "accelerate", "mlflow", "hydra-core")

Arm = Callable[[], float | None]
"""Does the work once. Returns the seconds that it timed itself, or None: then the whole call counts."""


@dataclass(frozen=True)
class Goal:
    """The target of a figure."""

    relation: Literal["<=", ">="]
    bound: float

    def verdict(self, value: float, low: float, high: float) -> str:
        """``reached`` or ``MISSED`` by the value, and whether the interval includes the target."""
        reached = value <= self.bound if self.relation == "<=" else value >= self.bound
        open_end = ", within the noise" if low <= self.bound <= high else ""
        return f"{self.relation} {self.bound:.4g}: {'reached' if reached else 'MISSED'}{open_end}"


@dataclass(frozen=True)
class Comparison:
    """Two arms, measured alternately.

    Attributes:
        name: what was compared, ``ours / other``.
        ratio: median over rounds of first arm's seconds / second arm's seconds; below 1 the first arm is faster.
        low: lower end of the ratio's 95 % interval.
        high: upper end of that interval.
        seconds: median seconds of each arm.
        cpu_seconds: median CPU seconds of each arm, over this process and all its children.
        pairs: number of rounds.
        other_load: share of all cores that other processes and other guests of the host used meanwhile.
        goal: target of the ratio.
    """

    name: str
    ratio: float
    low: float
    high: float
    seconds: tuple[float, float]
    cpu_seconds: tuple[float, float]
    pairs: int
    other_load: float
    goal: Goal | None = None

    def __str__(self) -> str:
        spent = f"{self.seconds[0]:.3f} / {self.seconds[1]:.3f} s"
        cpu = f"cpu {self.cpu_seconds[0]:.2f} / {self.cpu_seconds[1]:.2f} s"
        line = f"{self.name:<52} {self.ratio:7.4f}  [{self.low:.4f}, {self.high:.4f}]  {spent:<19} {cpu:<22}"
        return _with_verdict(f"{line} {self.pairs:>2} pairs", self.goal, self.ratio, self.low, self.high)


@dataclass(frozen=True)
class Figure:
    """One number, measured several times.

    Attributes:
        name: what was measured.
        value: the median or the mean.
        low: lower end of the median's 95 % interval; for a mean, the smallest value.
        high: upper end of that interval; for a mean, the largest value.
        unit: unit of the value; empty for shares and ratios.
        repeats: number of measurements.
        other_load: share of all cores that other processes used meanwhile; None if it does not matter.
        goal: target of the value.
    """

    name: str
    value: float
    low: float
    high: float
    unit: str
    repeats: int
    other_load: float | None = None
    goal: Goal | None = None

    @classmethod
    def of(
        cls,
        name: str,
        values: Sequence[float],
        unit: str = "",
        other_load: float | None = None,
        goal: Goal | None = None,
    ) -> "Figure":
        """The median of ``values`` with its interval."""
        return cls(name, median(values), *interval(values), unit, len(values), other_load, goal)

    @classmethod
    def mean_of(cls, name: str, values: Sequence[float], unit: str = "", goal: Goal | None = None) -> "Figure":
        """The mean of a few ``values``, with the smallest and the largest as its range."""
        return cls(name, fmean(values), min(values), max(values), unit, len(values), None, goal)

    def __str__(self) -> str:
        line = f"{self.name:<52} {self.value:9,.4g} {self.unit:<8} [{self.low:,.4g}, {self.high:,.4g}]"
        return _with_verdict(f"{line}  {self.repeats} times", self.goal, self.value, self.low, self.high)


Row = Comparison | Figure


def _with_verdict(line: str, goal: Goal | None, value: float, low: float, high: float) -> str:
    return f"{line}  {goal.verdict(value, low, high)}" if goal else line


def compare(name: str, first: Arm, second: Arm, pairs: int, goal: Goal | None = None) -> Comparison:
    """Run both arms once unmeasured, then ``pairs`` times in the order A B, B A, A B, ..."""
    return compare_all(first, {name: second}, pairs, {name: goal} if goal else {})[0]


def compare_all(
    first: Arm, others: Mapping[str, Arm], pairs: int, goals: Mapping[str, Goal] | None = None
) -> list[Comparison]:
    """Compare the first arm with each of the others: A B C, C B A, A B C, ... after one unmeasured round.

    Args:
        first: the arm that all others are compared with.
        others: name of the comparison -> arm.
        pairs: number of measured rounds.
        goals: name of the comparison -> target of its ratio.
    """
    arms = [first, *others.values()]
    for arm in arms:
        arm()
    meter = LoadMeter()
    rounds = [_round(arms, backwards=number % 2 == 1) for number in range(pairs)]
    load = meter.other_load()
    return [
        _comparison(name, [(spent[0], spent[index]) for spent in rounds], load, (goals or {}).get(name))
        for index, name in enumerate(others, start=1)
    ]


Spent = tuple[float, float]  # seconds, CPU seconds


def _round(arms: Sequence[Arm], *, backwards: bool) -> list[Spent]:
    """Run each arm once. Returns seconds and CPU seconds in the order of ``arms``."""
    order = list(reversed(arms)) if backwards else list(arms)
    spent = [_measured(arm) for arm in order]
    return spent[::-1] if backwards else spent


def _comparison(name: str, pairs: Sequence[tuple[Spent, Spent]], load: float, goal: Goal | None) -> Comparison:
    ratios = [ours[0] / theirs[0] for ours, theirs in pairs]
    seconds, cpu_seconds = ((median(ours[k] for ours, _ in pairs), median(o[k] for _, o in pairs)) for k in (0, 1))
    return Comparison(name, median(ratios), *interval(ratios), seconds, cpu_seconds, len(pairs), load, goal)


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median."""
    rng = random.Random(0)
    medians = sorted(median(rng.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def publish(benchmark: str, rows: Sequence[Row], notes: Mapping[str, Any] | None = None) -> None:
    """Print the table and write ``results/<benchmark>.json`` with machine, versions and date.

    A single round is a trial: it is not written, so that it does not replace a measurement. For a GPU the file is
    ``results/<benchmark>-gpu.json``.
    """
    print(f"\n{benchmark}: a / b is seconds of a over seconds of b; median [95 % interval]")
    for row in rows:
        print(row)
    for name, value in (notes or {}).items():
        print(f"{name}: {value}")
    load = max((row.other_load for row in rows if row.other_load is not None), default=0.0)
    if load > BUSY:
        print(f"DISTURBED: other processes took {load:.0%} of the cores meanwhile")
    if min(row.pairs if isinstance(row, Comparison) else row.repeats for row in rows) < 2:
        print("one round only: not written to results/")
        return
    content = {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "disturbed": load > BUSY,
        "machine": machine(),
        "comparisons": [asdict(row) for row in rows if isinstance(row, Comparison)],
        "figures": [asdict(row) for row in rows if isinstance(row, Figure)],
        "notes": dict(notes or {}),
    }
    RESULTS.mkdir(exist_ok=True)
    name = f"{benchmark}-gpu" if torch.cuda.is_available() else benchmark
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def arguments(description: str | None, pairs: int, steps: int | None = None) -> argparse.ArgumentParser:
    """A parser with the options of all benchmarks. ``steps``: default number of steps (256 images each) per turn."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pairs", type=int, default=pairs, help=f"measured rounds over all arms (default: {pairs})")
    if steps:
        parser.add_argument("--steps", type=int, default=steps, help=f"training steps a turn (default: {steps})")
    return parser


def machine() -> dict[str, object]:
    """Processor, cores, memory and the relevant versions."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "features": sorted({word for word in info.split() if word in ("avx512_bf16", "amx_bf16", "avx512f", "avx2")}),
        "cores": len(psutil.Process().cpu_affinity()),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _measured(arm: Arm) -> Spent:
    cpu, began = own_cpu_seconds(), time.perf_counter()
    seconds = arm()
    elapsed = time.perf_counter() - began
    return (elapsed if seconds is None else seconds), own_cpu_seconds() - cpu
