"""Limit the memory of this process for a while, so that an untrusted file cannot use up the machine."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]

_SLACK = 2 * 2**30  # bytes; address space for caches and for the reservations of a library's first call
_BYTES_PER_CORE = 80 * 2**20  # bytes; the stack of a thread and its memory arena


@contextmanager
def memory_limited(more: float) -> Iterator[None]:
    """Inside this context allocations fail once the process uses ``more`` bytes, plus some slack, more than now.

    Does nothing if the system has no such limit.
    """
    if resource is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(psutil.Process().memory_info().vms + more + _SLACK + _BYTES_PER_CORE * (psutil.cpu_count() or 1))
    lowest = min((wanted, *(limit for limit in before if limit != resource.RLIM_INFINITY)))
    with suppress(ValueError, OSError):  # macOS refuses some limits
        resource.setrlimit(resource.RLIMIT_AS, (lowest, before[1]))
    try:
        yield
    finally:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, before)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python raises MemoryError, torch a RuntimeError."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def available() -> int:
    """Bytes that a process can use without swapping."""
    return int(psutil.virtual_memory().available)
