"""Paired measurements: arms alternate in one run, ratios are taken pair by pair, other load on the machine is noticed.

Machines are noisy and shared: quote the ratio and its interval, never a single time.
"""

import json
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import psutil

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "lightning", "accelerate")
BUSY = 0.05  # share of all cores that other processes may take before a run is called disturbed


@dataclass(frozen=True)
class Comparison:
    """Two arms, measured in turn.

    Attributes:
        name: what was compared, ``ours / other``.
        ratio: median over pairs of the first arm's seconds over the second's; below 1 the first is faster.
        low: lower end of the ratio's 95 % interval.
        high: upper end.
        seconds: median seconds of each arm.
        cpu_seconds: median CPU seconds of each arm, over this process and its children.
        pairs: how many.
        other_load: share of all cores that other processes took meanwhile.
    """

    name: str
    ratio: float
    low: float
    high: float
    seconds: tuple[float, float]
    cpu_seconds: tuple[float, float]
    pairs: int
    other_load: float

    def __str__(self) -> str:
        disturbed = f"   DISTURBED: other processes took {self.other_load:.0%}" if self.other_load > BUSY else ""
        return (
            f"{self.name:<44} {self.ratio:.3f}  [{self.low:.3f}, {self.high:.3f}]  "
            f"{self.seconds[0]:.3f} s / {self.seconds[1]:.3f} s  "
            f"cpu {self.cpu_seconds[0]:.2f} / {self.cpu_seconds[1]:.2f}  {self.pairs} pairs{disturbed}"
        )


def compare(name: str, first: Callable[[], object], second: Callable[[], object], pairs: int) -> Comparison:
    """Run both arms once unmeasured, then ``pairs`` times in the order A B, B A, A B, ..."""
    first()
    second()
    times: list[tuple[float, float]] = []
    cpu: list[tuple[float, float]] = []
    busy, own, began = _machine_busy(), _own_cpu(), time.perf_counter()
    for pair in range(pairs):
        order = (first, second) if pair % 2 == 0 else (second, first)
        measured = [_measured(arm) for arm in order]
        ours, theirs = measured if pair % 2 == 0 else reversed(measured)
        times.append((ours[0], theirs[0]))
        cpu.append((ours[1], theirs[1]))
    elapsed = time.perf_counter() - began
    other = max(0.0, _machine_busy() - busy - (_own_cpu() - own)) / (elapsed * psutil.cpu_count())
    ratios = [ours / theirs for ours, theirs in times]
    low, high = interval(ratios)
    return Comparison(
        name,
        median(ratios),
        low,
        high,
        (median(t for t, _ in times), median(t for _, t in times)),
        (median(t for t, _ in cpu), median(t for _, t in cpu)),
        pairs,
        other,
    )


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median."""
    rng = random.Random(0)
    medians = sorted(median(rng.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def publish(benchmark: str, comparisons: Sequence[Comparison], notes: Mapping[str, object] | None = None) -> None:
    """Print the table and write ``results/<benchmark>.json`` with machine, versions and date."""
    print(f"\n{benchmark}: seconds of the first over the second, median [95 % interval]")
    for comparison in comparisons:
        print(comparison)
    for name, value in (notes or {}).items():
        print(f"{name}: {value}")
    content = {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": machine(),
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "notes": dict(notes or {}),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{benchmark}.json").write_text(json.dumps(content, indent=1) + "\n")


def machine() -> dict[str, object]:
    """Processor, cores, memory and the versions that matter."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "features": sorted({word for word in info.split() if word in ("avx512_bf16", "amx_bf16", "avx512f", "avx2")}),
        "cores": len(psutil.Process().cpu_affinity()),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _measured(arm: Callable[[], object]) -> tuple[float, float]:
    cpu, began = _own_cpu(), time.perf_counter()
    arm()
    return time.perf_counter() - began, _own_cpu() - cpu


def _own_cpu() -> float:
    """CPU seconds of this process and of all its children, ended or not."""
    times = psutil.Process().cpu_times()
    running = 0.0
    for child in psutil.Process().children(recursive=True):
        try:
            spent = child.cpu_times()
            running += spent.user + spent.system + spent.children_user + spent.children_system
        except psutil.NoSuchProcess:
            continue
    return times.user + times.system + times.children_user + times.children_system + running


def _machine_busy() -> float:
    times = psutil.cpu_times()
    return times.user + times.system + times.nice
