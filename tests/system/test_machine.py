"""The machine in tags and metrics: other processes' load is separated from the run's, and limits are seen."""

import multiprocessing
import os
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import psutil
import pytest

from cifar_exp.system import host, load_watch
from cifar_exp.system.host import own_cores
from cifar_exp.system.load_watch import LoadMeter, LoadWatch, disturbances, own_cpu_seconds
from cifar_exp.system.machine import description

BURN = "import time; end = time.process_time() + {}\nwhile time.process_time() < end: pass"


def test_cpu_seconds_include_running_and_ended_children() -> None:
    before = own_cpu_seconds()
    subprocess.run([sys.executable, "-c", BURN.format(0.5)], check=True)
    assert own_cpu_seconds() - before >= 0.45


def burn(seconds: float) -> None:
    exec(BURN.format(seconds))


def test_cpu_seconds_include_ranks() -> None:
    """They are children of the fork server, and have ended when the load is sampled."""
    before = own_cpu_seconds()
    rank = multiprocessing.get_context("forkserver").Process(target=burn, args=(0.5,))
    rank.start()
    rank.join()
    assert own_cpu_seconds() - before >= 0.45


def test_load_of_another_process_is_detected() -> None:
    """The process outlives the shell that started it, so it is not a child of the test."""
    meter = LoadMeter()
    command = f"{sys.executable} -c '{BURN.format(30)}' > /dev/null 2>&1 & echo $!"
    orphan = int(subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout)
    try:
        time.sleep(1)
        assert meter.other_load() > 0.2 / len(host.own_cores())
    finally:
        psutil.Process(orphan).kill()


def test_other_load_is_total_minus_own_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 10 s on two cores: 13 s of work, 11 of it ours."""
    times = iter([100.0, 113.0]), iter([20.0, 31.0]), iter([5.0, 15.0])
    for name, values in zip(("_machine_busy", "own_cpu_seconds"), times, strict=False):
        monkeypatch.setattr(load_watch, name, lambda values=values: next(values))
    monkeypatch.setattr(load_watch, "time", SimpleNamespace(perf_counter=lambda: next(times[2])))
    monkeypatch.setattr(load_watch, "own_cores", lambda: [0, 1])
    assert LoadMeter().other_load() == pytest.approx(0.1)


def test_a_watch_ends_with_shares_and_clocks() -> None:
    with LoadWatch("cpu", 1) as watch:
        time.sleep(0.1)
    metrics = watch.metrics()
    assert 0 <= metrics["machine/other_load"] <= 1
    assert all(name.startswith("machine/") for name in metrics)
    assert not any("gpu" in name for name in metrics)


def test_the_description_names_processor_cores_and_memory() -> None:
    tags = description("cpu", 1)
    assert tags["machine.cores"] == str(len(own_cores()))
    assert int(tags["machine.memory_gib"]) >= 1
    assert len(tags["machine.processor"]) > 2
    assert not any("gpu" in name for name in tags)


@pytest.mark.parametrize(
    ("metrics", "warnings"),
    [
        ({"machine/other_load": 0.04, "machine/cpu_thermal_events": 0.0}, []),
        ({"machine/other_load": 0.12}, ["other processes took 12% of the cores"]),
        ({"machine/quota_throttled": 0.3}, ["the container's CPU quota stopped it for 30% of the time"]),
        ({"machine/cpu_thermal_events": 2.0}, ["heat slowed the processor down, 2 time(s)"]),
        ({"machine/gpu_thermal_limited": 0.5}, ["heat held the GPUs' clocks down for 50% of the time"]),
        ({"machine/gpu_power_limited": 1.0}, []),  # a GPU at its power limit is at its own limit
    ],
)
def test_warnings_about_a_disturbed_run(metrics: dict[str, float], warnings: list[str]) -> None:
    assert [text.format(share) for text, share in disturbances(metrics).items()] == warnings


def use(pid: int, percent: int) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, smUtil=percent)


class FakeNvml(ModuleType):
    """NVIDIA's library with two GPUs, the second of which is hot; the functions that are used, by their own names."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU, NVML_P2P_CAPS_INDEX_NVLINK, NVML_P2P_STATUS_OK = 1, 0, 2, 0
    nvmlClocksThrottleReasonSwPowerCap, nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 4, 128  # noqa: N815
    nvmlClocksThrottleReasonSwThermalSlowdown, nvmlClocksThrottleReasonHwThermalSlowdown = 32, 64  # noqa: N815
    NVMLError = KeyError

    def __init__(self) -> None:
        super().__init__("pynvml")
        for name, function in {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetName": lambda handle: f"GPU {handle}".encode(),
            "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=80 * 2**30),
            "nvmlSystemGetDriverVersion": lambda: "550.1",
            "nvmlDeviceGetP2PStatus": lambda *_: 5,
            "nvmlDeviceGetTopologyCommonAncestor": lambda *_: 30,
            "nvmlDeviceGetMaxClockInfo": lambda *_: 1980,
            "nvmlDeviceGetEnforcedPowerLimit": lambda _: 700_000,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 64 * handle,
            "nvmlDeviceGetClockInfo": lambda handle, _: 1900 - 300 * handle,
            "nvmlDeviceGetTemperature": lambda handle, _: 60 + 25 * handle,
            "nvmlDeviceGetPowerUsage": lambda _: 500_000,
            "nvmlDeviceGetProcessUtilization": lambda handle, _: self.used_by[handle],
        }.items():
            setattr(self, name, function)
        self.used_by = {0: [use(os.getpid(), 90)]}  # and nobody the second one


def test_gpus_are_described_and_watched_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    tags = description("gpu", 2)
    assert tags["machine.gpus"] == "GPU 0, GPU 1"
    assert tags["machine.gpu_links"] == "0-1 one host bridge"
    assert (tags["machine.gpu_memory_gib"], tags["machine.gpu_watts_max"]) == ("80, 80", "700")
    with LoadWatch("gpu", 2) as watch:
        time.sleep(0.05)
    metrics = watch.metrics()
    assert (metrics["machine/gpu_mhz"], metrics["machine/gpu_temperature"]) == (1600, 85)
    assert (metrics["machine/gpu_watts"], metrics["machine/gpu_thermal_limited"]) == (1000, 1)
    assert metrics["machine/gpu_power_limited"] == metrics["machine/gpu_other_load"] == 0
    assert any("heat held the GPUs' clocks down" in line for line in disturbances(metrics))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert description("gpu", 1)["machine.gpus"] == "GPU 1"


def test_other_gpu_processes_disturb_a_run_if_its_own_pids_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvml = FakeNvml()
    nvml.used_by[1] = [use(os.getpid(), 60), use(1, 20), use(1, 40)]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with LoadWatch("gpu", 2) as watch:
        time.sleep(0.05)
    assert watch.metrics()["machine/gpu_other_load"] == pytest.approx(0.3)
    warnings = [text.format(share) for text, share in disturbances(watch.metrics()).items()]
    assert "other processes kept the GPUs busy for 30% of the time" in warnings
    nvml.used_by = {0: [use(1, 90)], 1: [use(2, 90)]}  # ids of another namespace: our own may be among them
    with LoadWatch("gpu", 2) as watch:
        time.sleep(0.05)
    assert "machine/gpu_other_load" not in watch.metrics()


def test_no_gpus_are_reported_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises ImportError
    monkeypatch.setattr(host, "gpus_of_the_driver", lambda: ["NVIDIA H100", "NVIDIA H100"])
    assert description("gpu", 1)["machine.gpus"] == "NVIDIA H100"
    with LoadWatch("gpu", 1) as watch:
        time.sleep(0.01)
    assert not any("gpu" in name for name in watch.metrics())
