"""Takes away what macOS lacks, from each Python process that has this folder on its path.

Python imports a module of this name at its start. What libraries ask the system themselves stays Linux's.
"""

import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from cifar_exp.system import host

SYSCTL = {b"kern.bootsessionuuid": b"5E551045-B007", b"machdep.cpu.brand_string": b"Apple M0"}


def forbidden(*_arguments: object) -> NoReturn:
    raise AssertionError("a fork crashes on macOS once Objective-C has been used")


def sysctlbyname(name: bytes, value: Any, *_sizes: object) -> int:
    if name in SYSCTL:
        value.value = SYSCTL[name]
    return 0 if name in SYSCTL else -1


def c_function(library: ctypes.CDLL, name: str) -> Any:
    if library._name is None and name == "sysctlbyname":
        return sysctlbyname
    if library._name is None and name in ("prctl", "mallopt", "GOMP_parallel"):
        raise AttributeError(name)
    return linux(library, name)


for name in [name for name in dir(os) if name.lower().startswith("sched_")]:
    delattr(os, name)
if sys.version_info >= (3, 13):
    os.process_cpu_count = os.cpu_count  # which is what it is where there is no sched_getaffinity
del time.CLOCK_BOOTTIME
linux, ctypes.CDLL.__getattr__ = ctypes.CDLL.__getattr__, c_function  # type: ignore[method-assign]
os.fork = forbidden
sys.modules["multiprocessing.forkserver"] = None  # type: ignore[assignment]
host.MACOS, host.PROC, host.SYS, host.MACHINE_ID = True, *[Path("/none")] * 3
