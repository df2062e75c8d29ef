"""The system under the program: the one module that knows how Linux, macOS and Windows differ.

It asks for what it needs, a call or a file, rather than for the system's name, and each function says what is so where
that is missing. Standard library and psutil alone; what is slow to import is imported where it is needed, since this
module comes first in every process.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

StartMethod = Literal["fork", "forkserver", "spawn"]

PROC = Path("/proc")  # Linux alone
SYS = Path("/sys")
SHARED_MEMORY = "/dev/shm"
MACHINE_ID = Path("/etc/machine-id")
MACOS = sys.platform == "darwin"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


# Cores


def own_cores() -> list[int]:
    """The cores that this process may use; all there are where the system does not bind processes to some."""
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def keep_to_cores(cores: list[int]) -> None:
    """Threads that this one starts from now on, and itself, run on these alone, where the system can do that."""
    if bind := getattr(os, "sched_setaffinity", None):
        bind(0, cores)


@contextmanager
def threads_that_do_not_preempt() -> Iterator[None]:
    """Threads that are started meanwhile preempt none that runs, but for the scheduler's tick. On Linux alone."""
    system: Any = os
    if not hasattr(system, "sched_setscheduler") or not hasattr(system, "SCHED_BATCH"):
        yield
        return
    if system.sched_getscheduler(0) != system.SCHED_OTHER:  # somebody's choice
        yield
        return
    with suppress(OSError):  # a sandbox may refuse it
        system.sched_setscheduler(0, system.SCHED_BATCH, system.sched_param(0))
    try:
        yield
    finally:
        with suppress(OSError):
            system.sched_setscheduler(0, system.SCHED_OTHER, system.sched_param(0))


# Processes


def start_method() -> StartMethod:
    """How ranks are started: from a fork server; on macOS by spawn, since what a fork inherits of Metal crashes."""
    return "spawn" if MACOS or "forkserver" not in _start_methods() else "forkserver"


def worker_start_method() -> StartMethod:
    """How a rank starts processes that read images for it. A fork server would be one for each rank."""
    return "spawn" if MACOS or "fork" not in _start_methods() else "fork"


def _start_methods() -> list[str]:
    import multiprocessing

    return multiprocessing.get_all_start_methods()


def end_with_parent() -> None:
    """From now on this process is killed when its parent ends, however that ends.

    The kernel sees to it on Linux. Elsewhere a thread waits for the pipe that multiprocessing keeps open between the
    two.
    """
    import signal

    if prctl := c_function("prctl"):
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        return
    import multiprocessing
    import threading

    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_after, args=(parent.sentinel,), name="parent", daemon=True).start()


def _end_after(sentinel: int) -> None:
    import signal
    from multiprocessing.connection import wait

    wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def process_age() -> float:
    """Seconds since this process was started. psutil's own figure counts from a boot time in whole seconds on Linux."""
    import time

    import psutil

    created = psutil.Process().create_time()
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    if clock is None:
        return time.time() - created
    return time.clock_gettime(clock) - (created - psutil.boot_time())


# Identity


def machine_id() -> str:
    """What tells this machine from others of its name; empty where there is no such thing."""
    return _content(MACHINE_ID)


def boot_id() -> str:
    """Another one after each start of the machine; empty where that cannot be told."""
    return _content(PROC / "sys/kernel/random/boot_id") or _sysctl("kern.bootsessionuuid")


def pid_namespace() -> str:
    """Another one in each container, which counts its processes separately; empty where there are none."""
    try:
        return str((PROC / "self/ns/pid").readlink())
    except OSError:
        return ""


def process_started(pid: int) -> str:
    """When a process that lives was started; empty where none does.

    On Linux in ticks since the boot, whatever becomes of the clock: the 22nd field of its ``stat``, whose second, the
    command in parentheses, may hold anything. Elsewhere in seconds since the epoch, as the kernel noted them.
    """
    if (PROC / "self/stat").exists():
        fields = _content(PROC / str(pid) / "stat").rpartition(")")[2].split()
        return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""
    import psutil

    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.Error:
        return ""


# Libraries and network


def c_function(name: str) -> Any:
    """A function of the C library, which is called with plain numbers; None where it has none of this name."""
    import ctypes

    return getattr(ctypes.CDLL(None), name, None)


def library_file(name: str) -> str:
    """The file name of a shared library."""
    return f"lib{name}{'.dylib' if MACOS else '.so'}"


def loopback() -> str:
    """The name of the network interface that reaches this machine alone."""
    import socket

    names: set[str] = set()
    with suppress(OSError):
        names = {name for _, name in socket.if_nameindex()}
    return "lo0" if "lo0" in names and "lo" not in names else "lo"


# What the machine is and does


def processor() -> str:
    """The processor's name."""
    import platform

    for line in _content(PROC / "cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def multiplies_bfloat16() -> bool:
    """Whether the processor says that it multiplies bfloat16 natively."""
    flags = _content(PROC / "cpuinfo").split()
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def throttled_seconds() -> float | None:
    """How long a container's quota has stopped it so far; None where there is no such account."""
    for line in _content(SYS / "fs/cgroup/cpu.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == "throttled_usec":
            return int(value) / 1e6
    return None


def thermal_events() -> float | None:
    """How often heat has slowed these cores down so far; None where they do not say."""
    folder = SYS / "devices/system/cpu"
    counts = [_content(folder / f"cpu{core}" / "thermal_throttle/core_throttle_count") for core in own_cores()]
    told = [int(count) for count in counts if count.isdigit()]
    return float(sum(told)) if told else None


def gpus_of_the_driver() -> list[str]:
    """Names of NVIDIA's GPUs as the driver itself tells them."""
    files = sorted((PROC / "driver/nvidia/gpus").glob("*/information"))
    lines = [line for file in files for line in _content(file).splitlines()]
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]


def _sysctl(name: str) -> str:
    """What macOS says under this name; empty elsewhere."""
    import ctypes

    if (ask := c_function("sysctlbyname")) is None:
        return ""
    value, size = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
    failed = ask(name.encode(), value, ctypes.byref(size), None, ctypes.c_size_t(0))
    return "" if failed else value.value.decode(errors="replace")


def _content(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
