"""Process set-up: limits, memory, and how the process ends."""

import atexit
import os
import resource
import sys
import threading
from typing import NoReturn

from cifar_exp.errors import MachineError
from cifar_exp.system.host import c_function
from cifar_exp.system.standard_streams import flush_output

OPEN_FILES = 256  # several times as many as a parent with MLflow opens
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def allow_open_files() -> None:
    """Raise the limit of open files for this process and its ranks if it is too low.

    Raises:
        MachineError: the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:  # -1 is no limit
        if 0 <= hard < OPEN_FILES:
            raise MachineError(
                f"ulimit -n: a process may open {hard} files here, and a run needs up to {OPEN_FILES}. Run "
                f"ulimit -n {OPEN_FILES} first if you may, or ask the administrator of the machine"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation.

    By default glibc returns large blocks to the system, and the system clears every page when they are allocated again.
    A training step frees and allocates all activations. Blocks over 32 MiB, such as activations of 256 images in
    float32, are always returned.
    """
    if mallopt := c_function("mallopt"):  # musl and macOS have none
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def end_process(code: int) -> NoReturn:
    """End the process with this exit code, even if daemon threads are still running.

    A daemon thread in C++ code would abort the process when Python shuts down. So the exit functions are run here, and
    the process exits without Python's shutdown.
    """
    if not any(thread.daemon for thread in threading.enumerate()):
        sys.exit(code)
    atexit._run_exitfuncs()
    flush_output()
    os._exit(code)


def uv_prefix() -> str:
    """``uv run `` where uv started this process, for commands in messages; uv sets this variable."""
    return "uv run " if "UV" in os.environ else ""
