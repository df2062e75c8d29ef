"""The machine that a run had, and what else used it meanwhile: part of every result.

All of it is read by the parent, beside the training: the description once, counters before and after, clocks and
temperatures every few seconds. What cannot be read (another system, no NVIDIA library) is left out.
"""

import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

import psutil

BUSY = 0.05  # share of the cores that others may take, or of the time that clocks may be held down, undisturbed
SAMPLE_SECONDS = 5.0
GIB = 2**30
LINKS = {0: "one board", 10: "one PCIe switch", 20: "PCIe switches", 30: "one host bridge", 40: "one NUMA node"}


def description(accelerator: str, count: int) -> dict[str, str]:
    """The machine in tags: processor, cores this process may use, memory; GPUs, their limits and links.

    Args:
        accelerator: ``cpu`` or ``gpu``.
        count: how many GPUs train.
    """
    tags = {
        "machine.processor": _processor(),
        "machine.cores": str(len(own_cores())),
        "machine.memory_gib": str(round(psutil.virtual_memory().total / GIB)),
    }
    frequency = _clock_limit()
    if frequency:
        tags["machine.cpu_mhz_max"] = f"{frequency:.0f}"
    return tags | (_gpu_description(count) if accelerator == "gpu" else {})


def in_one_line(tags: Mapping[str, str]) -> str:
    """What :func:`description` says, among ``tags``; empty where they say nothing of a machine."""
    told = {name.removeprefix("machine."): value for name, value in tags.items() if name.startswith("machine.")}
    if "processor" not in told:
        return ""
    first = f"{told.pop('processor')}, {told.pop('cores', '?')} cores, {told.pop('memory_gib', '?')} GiB"
    return "; ".join([first, *(f"{name.replace('_', ' ')} {value}" for name, value in told.items())])


def disturbances(metrics: Mapping[str, float]) -> dict[str, float]:
    """What made a run slower than the machine is, from its metrics; nothing where nothing did.

    Returns:
        A sentence about each, with a place for how much that was, and how much: ``sentence.format(share)``.
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
    """What other processes, and other guests of the host, take of this process's cores from now on."""

    def __init__(self) -> None:
        self._busy, self._own, self._began = _machine_busy(), own_cpu_seconds(), time.perf_counter()

    def other_load(self) -> float:
        """Their share of these cores since the meter was made."""
        elapsed = time.perf_counter() - self._began
        others = _machine_busy() - self._busy - (own_cpu_seconds() - self._own)
        return min(1.0, max(0.0, others) / (elapsed * len(own_cores())))  # the kernel's clocks are coarse


class Watch:
    """Looks at the machine while ranks train, from ``with`` to its end.

    Args:
        accelerator: ``cpu`` or ``gpu``.
        count: how many GPUs train.
    """

    def __init__(self, accelerator: str, count: int) -> None:
        self._gpus = _Gpus(count) if accelerator == "gpu" else None
        self._samples: list[dict[str, float]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="machine", daemon=True)

    def __enter__(self) -> "Watch":
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
        """What was seen, once the watch has ended: loads as shares, clocks in MHz, temperatures in degrees Celsius."""
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
            with suppress(Exception):  # a reading that fails is a reading less
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


def own_cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def own_cpu_seconds() -> float:
    """CPU seconds of this process and of all its descendants, ended or not."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            spent = process.cpu_times()
            total += spent.user + spent.system + spent.children_user + spent.children_system
    return total


def _machine_busy() -> float:
    """Seconds that this process's cores have worked for anybody; ``steal`` is what other guests of the host took."""
    cores = psutil.cpu_times(percpu=True)
    times = [cores[number] for number in own_cores() if number < len(cores)]
    return sum(core.user + core.system + core.nice + getattr(core, "steal", 0.0) for core in times)


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _clock_limit() -> float | None:
    with suppress(Exception):  # psutil raises what the system does
        frequency = psutil.cpu_freq()
        return float(frequency.max) or None
    return None


def _cpu_sample() -> dict[str, float]:
    clocks = psutil.cpu_freq(percpu=True)
    own = [clocks[number].current for number in own_cores() if number < len(clocks)]
    return {"cpu_mhz": fmean(own)} if own else {}


def _counters() -> dict[str, float]:
    """What only grows: seconds that a container's quota stopped it, and how often heat slowed the processor."""
    counters = {}
    with suppress(OSError):
        for line in Path("/sys/fs/cgroup/cpu.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "throttled_usec":
                counters["throttled_seconds"] = int(value) / 1e6
    folder = Path("/sys/devices/system/cpu")
    events = [_number(folder / f"cpu{core}" / "thermal_throttle" / "core_throttle_count") for core in own_cores()]
    if any(event is not None for event in events):
        counters["thermal_events"] = float(sum(event or 0 for event in events))
    return counters


def _number(path: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _nvml() -> Any:
    """NVIDIA's library, where nvidia-ml-py is installed and there is a driver; else None."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver, another version of it
        return None
    return pynvml


def _handles(nvml: Any, count: int) -> list[Any]:
    """The first ``count`` of the GPUs that CUDA shows to this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names: Iterable[str] = visible.split(",") if visible else map(str, range(nvml.nvmlDeviceGetCount()))
    handles = [
        nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name.encode())
        for name in names
    ]
    return handles[:count]


def _gpu_description(count: int) -> dict[str, str]:
    """Names, memory, clock and power limits, and how the GPUs are joined."""
    nvml = _nvml()
    if nvml is None:
        return {"machine.gpus": ", ".join(names)} if (names := _gpu_names_without_nvml()[:count]) else {}
    tags = {}
    with suppress(Exception):
        handles = _handles(nvml, count)
        tags["machine.gpus"] = ", ".join(_text(nvml.nvmlDeviceGetName(handle)) for handle in handles)
        tags["machine.gpu_memory_gib"] = ", ".join(
            str(round(nvml.nvmlDeviceGetMemoryInfo(handle).total / GIB)) for handle in handles
        )
        tags["machine.driver"] = _text(nvml.nvmlSystemGetDriverVersion())
        tags["machine.gpu_links"] = ", ".join(_links(nvml, handles))
        tags["machine.gpu_mhz_max"] = str(nvml.nvmlDeviceGetMaxClockInfo(handles[0], nvml.NVML_CLOCK_SM))
        watts = nvml.nvmlDeviceGetEnforcedPowerLimit(handles[0]) / 1000
        tags["machine.gpu_watts_max"] = f"{watts:.0f}"
    return {name: value for name, value in tags.items() if value}


def _links(nvml: Any, handles: Sequence[Any]) -> list[str]:
    """How each two GPUs are joined, as in ``0-1 NVLink``."""
    links = []
    for second in range(1, len(handles)):
        for first in range(second):
            pair = handles[first], handles[second]
            direct = nvml.nvmlDeviceGetP2PStatus(*pair, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == nvml.NVML_P2P_STATUS_OK
            level = 0 if direct else nvml.nvmlDeviceGetTopologyCommonAncestor(*pair)
            links.append(f"{first}-{second} {'NVLink' if direct else LINKS.get(level, 'across the system')}")
    return links


def _gpu_names_without_nvml() -> list[str]:
    """What the driver itself tells."""
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with suppress(OSError):
            lines = path.read_text().splitlines()
            names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return names


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


class _Gpus:
    """Clocks, temperatures and limits of the GPUs that train; nothing without NVIDIA's library."""

    def __init__(self, count: int) -> None:
        self._nvml = _nvml()
        self._seen = time.time_ns() // 1000  # microseconds, as NVML counts
        self._handles: list[Any] = []
        with suppress(Exception):
            self._handles = _handles(self._nvml, count) if self._nvml else []

    def sample(self) -> dict[str, float]:
        """The slowest clock, the highest temperature, the power, and whether a limit holds some GPU's clock down."""
        nvml, handles = self._nvml, self._handles
        if not handles:
            return {}
        reasons = [nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle) for handle in handles]
        power = nvml.nvmlClocksThrottleReasonSwPowerCap | nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
        heat = nvml.nvmlClocksThrottleReasonSwThermalSlowdown | nvml.nvmlClocksThrottleReasonHwThermalSlowdown
        return {
            "gpu_mhz": min(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) for handle in handles),
            "gpu_temperature": max(
                nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU) for handle in handles
            ),
            "gpu_watts": sum(nvml.nvmlDeviceGetPowerUsage(handle) for handle in handles) / 1000,
            "gpu_power_limited": float(any(reason & power for reason in reasons)),
            "gpu_thermal_limited": float(any(reason & heat for reason in reasons)),
            **self._other_load(),
        }

    def _other_load(self) -> dict[str, float]:
        """The share of the time since the last look that others' kernels took of the GPU that had most of them.

        Nothing where none of this run's own processes is listed: in a container they may have other ids there, and
        would pass for somebody else's.
        """
        own = {process.pid for process in (psutil.Process(), *psutil.Process().children(recursive=True))}
        since, self._seen = self._seen, time.time_ns() // 1000
        loads, found_own = [], False
        for handle in self._handles:
            with suppress(self._nvml.NVMLError):  # nobody used it, or it does not tell
                shares: dict[int, list[float]] = {}
                for sample in self._nvml.nvmlDeviceGetProcessUtilization(handle, since):
                    shares.setdefault(sample.pid, []).append(sample.smUtil / 100)
                found_own |= not own.isdisjoint(shares)
                loads.append(sum(fmean(values) for pid, values in shares.items() if pid not in own))
        return {"gpu_other_load": min(1.0, max(loads))} if found_own else {}
