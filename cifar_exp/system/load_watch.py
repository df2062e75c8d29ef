"""Watch the load, clocks and limits of the machine while a run trains."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from statistics import fmean
from types import TracebackType

import psutil

from cifar_exp.system import host
from cifar_exp.system.cpu_quota import throttled_seconds
from cifar_exp.system.gpu import GpuReadings
from cifar_exp.system.host import own_cores

BUSY = 0.05  # a larger share of cores taken by others, or of time with throttled clocks, is a disturbance
SAMPLE_SECONDS = 5.0


def disturbances(metrics: Mapping[str, float]) -> dict[str, float]:
    """What slowed a run down, from its metrics; empty if nothing did.

    Returns:
        A sentence with a placeholder for each disturbance, and its amount: ``sentence.format(amount)``.
    """
    limits = {
        "machine/other_load": ("other processes took {:.0%} of the cores", BUSY),
        "machine/quota_throttled": ("the container's CPU quota stopped it for {:.0%} of the time", BUSY),
        "machine/cpu_thermal_events": ("heat slowed the processor down, {:.0f} time(s)", 0),
        "machine/gpu_other_load": ("other processes kept the GPUs busy for {:.0%} of the time", BUSY),
        "machine/gpu_thermal_limited": ("heat held the GPUs' clocks down for {:.0%} of the time", BUSY),
    }
    return {text: metrics[name] for name, (text, limit) in limits.items() if metrics.get(name, 0.0) > limit}


class LoadMeter:
    """Measures how much other processes, and other guests of the host, use this process's cores."""

    def __init__(self) -> None:
        self._busy, self._own, self._began = _machine_busy(), own_cpu_seconds(), time.perf_counter()

    def other_load(self) -> float:
        """Their share of these cores since the meter was created."""
        elapsed = time.perf_counter() - self._began
        others = _machine_busy() - self._busy - (own_cpu_seconds() - self._own)
        return min(1.0, max(0.0, others) / (elapsed * len(own_cores())))  # the kernel's counters are coarse


class LoadWatch:
    """Samples the machine in a thread while ranks train, as a context manager.

    Args:
        accelerator: ``cpu``, ``gpu`` or ``mps``.
        count: how many GPUs train.
    """

    def __init__(self, accelerator: str, count: int) -> None:
        self._gpus = GpuReadings(count) if accelerator == "gpu" else None
        self._samples: list[dict[str, float]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="machine", daemon=True)

    def __enter__(self) -> "LoadWatch":
        self._load, self._before, self._began = LoadMeter(), _counters(), time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._other_load, self._seconds = self._load.other_load(), time.perf_counter() - self._began
        self._after = _counters()

    def metrics(self) -> dict[str, float]:
        """The readings after the end: loads as shares, clocks in MHz, temperatures in degrees Celsius."""
        grown = {name: value - self._before.get(name, value) for name, value in self._after.items()}
        seen = {name: [sample[name] for sample in self._samples if name in sample] for name in SUMMARIES}
        metrics = {"machine/other_load": self._other_load}
        if "throttled_seconds" in grown:
            metrics["machine/quota_throttled"] = grown["throttled_seconds"] / (self._seconds * len(own_cores()))
        if "thermal_events" in grown:
            metrics["machine/cpu_thermal_events"] = grown["thermal_events"]
        return metrics | {f"machine/{name}": SUMMARIES[name](values) for name, values in seen.items() if values}

    def _look(self) -> None:
        while True:
            with suppress(Exception):  # a failed reading is skipped
                self._samples.append(_cpu_sample() | (self._gpus.sample() if self._gpus else {}))
            if self._ended.wait(SAMPLE_SECONDS):
                return


SUMMARIES: dict[str, Callable[[Sequence[float]], float]] = {
    "cpu_mhz": fmean,
    "gpu_mhz": fmean,
    "gpu_temperature": max,
    "gpu_watts": fmean,
    "gpu_power_limited": fmean,
    "gpu_thermal_limited": fmean,
    "gpu_other_load": fmean,
}


def own_cpu_seconds() -> float:
    """CPU seconds of this process and all its descendants, including ended ones."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            spent = process.cpu_times()
            total += spent.user + spent.system + spent.children_user + spent.children_system
    return total


def _machine_busy() -> float:
    """Busy seconds of this process's cores over all processes; ``steal`` is time taken by other guests of the host."""
    cores = psutil.cpu_times(percpu=True)
    times = [cores[number] for number in own_cores() if number < len(cores)]
    return sum(core.user + core.system + core.nice + getattr(core, "steal", 0.0) for core in times)


def _cpu_sample() -> dict[str, float]:
    clocks = psutil.cpu_freq(percpu=True)
    own = [clocks[number].current for number in own_cores() if number < len(clocks)]
    return {"cpu_mhz": fmean(own)} if own else {}


def _counters() -> dict[str, float]:
    """Monotonic counters: seconds of CPU-quota throttling, number of thermal throttling events."""
    counters = {"throttled_seconds": throttled_seconds(), "thermal_events": host.thermal_events()}
    return {name: value for name, value in counters.items() if value is not None}
