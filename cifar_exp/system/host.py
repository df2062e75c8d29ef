"""The differences between Linux, macOS and Windows. Only this module depends on the operating system.

Features are detected by the call or file that they need, not by the system's name. Each function documents its result
without the feature. Only the standard library and psutil are imported, and slow modules inside functions, since every
process imports this module first.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args

StartMethod = Literal["fork", "forkserver", "spawn"]
START_METHODS = get_args(StartMethod)

PROC = Path("/proc")  # Linux only
SYS = Path("/sys")
SHARED_MEMORY = "/dev/shm"
MACHINE_ID = Path("/etc/machine-id")
MACOS = sys.platform == "darwin"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


# Cores


def own_cores() -> list[int]:
    """The numbers of the cores that this process may use. Without CPU affinity, all cores of the machine."""
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def keep_to_cores(cores: list[int]) -> None:
    """Bind this thread, and those that it starts later, to ``cores``. Without CPU affinity, do nothing."""
    if bind := getattr(os, "sched_setaffinity", None):
        bind(0, cores)


@contextmanager
def threads_that_do_not_preempt() -> Iterator[None]:
    """Threads started inside this context get SCHED_BATCH: they do not preempt a running thread. Linux only."""
    system: Any = os
    if not hasattr(system, "sched_setscheduler") or not hasattr(system, "SCHED_BATCH"):
        yield
        return
    if system.sched_getscheduler(0) != system.SCHED_OTHER:  # the user chose another policy
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
    """How ranks are started: by a fork server; on macOS by spawn, since Metal's state crashes in a forked process."""
    return "spawn" if MACOS or "forkserver" not in _start_methods() else "forkserver"


def worker_start_method() -> StartMethod:
    """How a rank starts its data loader workers. A fork server is not used: each rank would need its own."""
    return "spawn" if MACOS or "fork" not in _start_methods() else "fork"


def _start_methods() -> list[str]:
    import multiprocessing

    return multiprocessing.get_all_start_methods()


def shared_lock_problem() -> str:
    """Why processes cannot share locks here; empty if they can. On Linux such locks are files in shared memory."""
    import multiprocessing

    try:
        multiprocessing.get_context(worker_start_method()).Lock()
    except (OSError, ImportError) as error:  # ImportError: Python was built without them
        return getattr(error, "strerror", None) or str(error)
    return ""


def end_with_parent() -> None:
    """Make this process end when its parent ends, for any reason.

    On Linux the kernel kills it. Elsewhere a thread waits for the end of multiprocessing's pipe to the parent.
    """
    import multiprocessing
    import signal
    import threading

    parent = multiprocessing.parent_process()
    if prctl := c_function("prctl"):
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent and not parent.is_alive():  # it ended before this call, which the kernel does not report
            os.kill(os.getpid(), signal.SIGKILL)
    elif parent:
        threading.Thread(target=_end_after, args=(parent.sentinel,), name="parent", daemon=True).start()


def _end_after(sentinel: int) -> None:
    import signal
    from multiprocessing.connection import wait

    wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def process_age() -> float:
    """Seconds since this process was started. On Linux psutil's creation time is relative to a rounded boot time."""
    import time

    import psutil

    created = psutil.Process().create_time()
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    if clock is None:
        return time.time() - created
    return time.clock_gettime(clock) - (created - psutil.boot_time())


# Identity


def machine_id() -> str:
    """The machine's unique id; empty if the system has none."""
    return content(MACHINE_ID)


def boot_id() -> str:
    """An id that changes at each boot of the machine; empty if the system has none."""
    return content(PROC / "sys/kernel/random/boot_id") or _sysctl("kern.bootsessionuuid")


def pid_namespace() -> str:
    """The id of the PID namespace, which differs between containers; empty if the system has none."""
    try:
        return str((PROC / "self/ns/pid").readlink())
    except OSError:
        return ""


def process_started(pid: int) -> str:
    """The start time of a live process; empty if there is no such process.

    On Linux the time is in clock ticks since boot, so a change of the clock does not affect it. It is field 22 of
    ``/proc/<pid>/stat``; field 2, the command in parentheses, may contain spaces. Elsewhere it is in seconds since the
    epoch.
    """
    if (PROC / "self/stat").exists():
        fields = content(PROC / str(pid) / "stat").rpartition(")")[2].split()
        return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""
    import psutil

    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.Error:
        return ""


def start_environment() -> dict[str, str] | None:
    """The environment variables that this process was started with; None if the system does not keep them."""
    try:
        pairs = (PROC / "self/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return {name: value for name, _, value in (os.fsdecode(pair).partition("=") for pair in pairs)}


def control_groups() -> list[str]:
    """The lines of ``/proc/self/cgroup``: the control groups of this process. Empty without control groups."""
    return content(PROC / "self/cgroup").splitlines()


def mounts() -> list[str]:
    """The lines of ``/proc/self/mountinfo``: the mounts of this process. Empty if the system does not list them."""
    return content(PROC / "self/mountinfo").splitlines()


# Libraries and network


def c_function(name: str) -> Any:
    """A function of the C library; None if it has none of this name."""
    import ctypes

    return getattr(ctypes.CDLL(None), name, None)


def library_file(name: str) -> str:
    """The file name of a shared library."""
    return f"lib{name}{'.dylib' if MACOS else '.so'}"


def loopback() -> str:
    """The name of the loopback network interface."""
    import socket

    names: set[str] = set()
    with suppress(OSError):
        names = {name for _, name in socket.if_nameindex()}
    return "lo0" if "lo0" in names and "lo" not in names else "lo"


# Hardware and load


def processor() -> str:
    """The processor's name."""
    import platform

    for line in content(PROC / "cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def may_have_apples_gpu() -> bool:
    """Whether this is a system that has Apple's Metal. PyTorch knows whether there is a GPU, and takes a second."""
    return MACOS


def multiplies_bfloat16() -> bool:
    """Whether the processor reports native bfloat16 multiplication. False if it reports nothing."""
    flags = content(PROC / "cpuinfo").split()
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def thermal_events() -> float | None:
    """How often this process's cores were throttled by heat so far; None if the system does not count it."""
    folder = SYS / "devices/system/cpu"
    counts = [content(folder / f"cpu{core}" / "thermal_throttle/core_throttle_count") for core in own_cores()]
    known = [int(count) for count in counts if count.isdigit()]
    return float(sum(known)) if known else None


def gpus_of_the_driver() -> list[str]:
    """The names of NVIDIA GPUs as reported by the driver."""
    files = sorted((PROC / "driver/nvidia/gpus").glob("*/information"))
    lines = [line for file in files for line in content(file).splitlines()]
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]


def _sysctl(name: str) -> str:
    """A text value of macOS's sysctl; empty on other systems."""
    import ctypes

    if (ask := c_function("sysctlbyname")) is None:
        return ""
    value, size = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
    failed = ask(name.encode(), value, ctypes.byref(size), None, ctypes.c_size_t(0))
    return "" if failed else value.value.decode(errors="replace")


def content(path: Path) -> str:
    """The text of a system's file; empty if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
