"""GPU facts and readings from NVIDIA's library (NVML)."""

import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from statistics import fmean
from typing import Any

import psutil

from cifar_exp.system import host

GIB = 2**30
LINKS = {0: "one board", 10: "one PCIe switch", 20: "PCIe switches", 30: "one host bridge", 40: "one NUMA node"}


def _nvml() -> Any:
    """NVML; None without nvidia-ml-py or without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, no driver, or an incompatible version
        return None
    return pynvml


def _handles(nvml: Any, count: int) -> list[Any]:
    """Handles of the first ``count`` GPUs that are visible to CUDA in this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names: Iterable[str] = visible.split(",") if visible else map(str, range(nvml.nvmlDeviceGetCount()))
    handles = [
        nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name.encode())
        for name in names
    ]
    return handles[:count]


def gpu_description(count: int) -> dict[str, str]:
    """Names, memory, clock and power limits, and links of the GPUs, as tags."""
    nvml = _nvml()
    if nvml is None:
        return {"machine.gpus": ", ".join(names)} if (names := host.gpus_of_the_driver()[:count]) else {}
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
    """The link between each two GPUs, for example ``0-1 NVLink``."""
    links = []
    for second in range(1, len(handles)):
        for first in range(second):
            pair = handles[first], handles[second]
            direct = nvml.nvmlDeviceGetP2PStatus(*pair, nvml.NVML_P2P_CAPS_INDEX_NVLINK) == nvml.NVML_P2P_STATUS_OK
            level = 0 if direct else nvml.nvmlDeviceGetTopologyCommonAncestor(*pair)
            links.append(f"{first}-{second} {'NVLink' if direct else LINKS.get(level, 'across the system')}")
    return links


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


class GpuReadings:
    """Clocks, temperatures and limits of the training GPUs; empty without NVML."""

    def __init__(self, count: int) -> None:
        self._nvml = _nvml()
        self._seen = time.time_ns() // 1000  # microseconds, as NVML counts
        self._handles: list[Any] = []
        with suppress(Exception):
            self._handles = _handles(self._nvml, count) if self._nvml else []

    def sample(self) -> dict[str, float]:
        """Lowest clock, highest temperature, total power, and whether a limit throttles some GPU."""
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
        """The largest share of a GPU's time since the last sample that other processes' kernels took.

        Empty if none of this run's processes is listed: in a container NVML may list other process ids, and this
        run's kernels would be taken for others'.
        """
        own = {process.pid for process in (psutil.Process(), *psutil.Process().children(recursive=True))}
        since, self._seen = self._seen, time.time_ns() // 1000
        loads, found_own = [], False
        for handle in self._handles:
            with suppress(self._nvml.NVMLError):  # no process used it, or the GPU does not report it
                shares: dict[int, list[float]] = {}
                for sample in self._nvml.nvmlDeviceGetProcessUtilization(handle, since):
                    shares.setdefault(sample.pid, []).append(sample.smUtil / 100)
                found_own |= not own.isdisjoint(shares)
                loads.append(sum(fmean(values) for pid, values in shares.items() if pid not in own))
        return {"gpu_other_load": min(1.0, max(loads))} if found_own else {}
