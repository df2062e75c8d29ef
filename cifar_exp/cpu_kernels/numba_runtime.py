"""Compile kernels with numba and run them on torch's threads.

A kernel has one argument, the address of an array of int64: integers, floats as bits, and addresses of arrays.
:func:`arguments` reads that array into named fields. numba compiles a kernel when a machine first uses it, and caches
the machine code on disk.

numpy has no bfloat16, so kernels see it as uint16. Arithmetic is float32.
"""

import ctypes
import struct
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import torch
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload
from torch import Tensor

from cifar_exp.system.host import library_file

Kernel = Callable[[Any, int], Any]  # takes dtype of activations and variant, returns the function to compile

ELEMENTS = {torch.bfloat16: np.uint16, torch.float32: np.float32}
OPTIONS = {"fastmath": {"contract"}, "error_model": "numpy"}  # no check for division by zero
# The source of every file in this folder, for the cache key: a kernel may use functions from any of them.
SOURCES = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]

# Kernels run on the threads of the OpenMP library that torch uses: two thread pools would compete for the cores. A
# preloaded OpenMP library replaces torch's, so it is tried first.
_openmp = ctypes.CDLL(None)
if not hasattr(_openmp, "GOMP_parallel"):
    _openmp = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / library_file("torch_cpu")))
_openmp.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
_openmp.GOMP_parallel.restype = None
for _name in ("omp_get_thread_num", "omp_get_num_threads", "GOMP_barrier"):
    llvm.add_symbol(_name, ctypes.cast(getattr(_openmp, _name), ctypes.c_void_p).value)
thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())
thread_count = types.ExternalFunction("omp_get_num_threads", types.int32())
wait_for_threads = types.ExternalFunction("GOMP_barrier", types.void())
cfunc(types.void())(lambda: None)  # triggers numba's lazy imports before ranks are forked


@intrinsic
def pointer(_context, address):
    """An address as a pointer."""

    def generate(_context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


def arguments(fields: type) -> Any:
    """Make a function for kernels that reads their array of int64 into ``fields``, a ``NamedTuple``."""
    count = len(fields._fields)  # type: ignore[attr-defined]
    taken = types.NamedUniTuple(types.int64, count, fields)

    @intrinsic
    def read(_context, packed):
        def generate(context, builder, _signature, values):
            slots = [builder.load(cgutils.gep_inbounds(builder, values[0], place)) for place in range(count)]
            return context.make_tuple(builder, taken, slots)

        return taken(packed), generate

    return read


@njit(inline="always")
def share(count):
    """The part of ``count`` items for this thread: its first index, and its last index + 1."""
    return count * thread_number() // thread_count(), count * (thread_number() + 1) // thread_count()


def widened(value):
    """A value as float32."""


@overload(widened, inline="always")
def _overload_widened(value):
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


def narrowed(value, like):
    """A float32 rounded to the dtype of the array ``like``, to nearest, ties to even."""


@overload(narrowed, inline="always")
def _overload_narrowed(value, like):
    if like.dtype != types.uint16:
        return lambda value, like: value

    def rounded(value, like):
        bits = np.float32(value).view(np.uint32)
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        upper = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd) >> np.uint32(16)
        return np.uint16(upper) if value == value else np.uint16(0x7FC0)

    return rounded


@cache
def target() -> tuple[str, str, frozenset[str]]:
    """The target of numba: system, processor, and enabled processor features."""
    system, processor, features = cpu_target.target_context.codegen().magic_tuple()
    return system, processor, frozenset(name[1:] for name in features.split(",") if name.startswith("+"))


@cache
def _cache_key() -> str:
    """The cache key: a hash of the machine and of every file in this folder."""
    system, processor, features = target()
    machine = " ".join([system, processor, *sorted(features)])
    return sha256(b"".join([machine.encode(), *SOURCES])).hexdigest()[:12]


@cache
def compiled(kernel: Kernel, dtype: torch.dtype, variant: int = 0) -> Any:
    """A kernel's machine code. Its argument is the address of an array of int64; see the head of this file.

    Raises:
        Exception: numba cannot compile the kernel here. It raises exceptions of many types.
    """
    function = kernel(ELEMENTS[dtype], variant)
    # numba caches all functions of one name in one file. Two processes that write it would corrupt it, and numba checks
    # only the kernel's own source file for changes. So the whole cache key is part of the name.
    function.__qualname__ = f"{kernel.__name__}-{str(dtype).removeprefix('torch.')}-{variant}-{_cache_key()}"
    for on_disk in (True, False):  # the cache may be read-only, full or damaged
        with suppress(Exception) if on_disk else nullcontext():
            return cfunc(types.void(types.CPointer(types.int64)), cache=on_disk, **OPTIONS)(function)
    raise AssertionError


def launch(
    kernel: Kernel,
    shape: tuple[int, ...],
    *arrays: Tensor,
    numbers: tuple[float, ...] = (),
    variant: int = 0,
) -> None:
    """Run a kernel on all of torch's threads.

    Args:
        kernel: the kernel.
        shape: integers, its first arguments.
        numbers: floats, the arguments after these.
        arrays: contiguous arrays, its last arguments. The first one has the dtype of the activations.
        variant: number of the kernel's variant, such as an activation.
    """
    bits = struct.unpack(f"{len(numbers)}q", struct.pack(f"{len(numbers)}d", *numbers))
    values = (*shape, *bits, *(array.data_ptr() for array in arrays))
    packed = (ctypes.c_int64 * len(values))(*values)
    code = compiled(kernel, arrays[0].dtype, variant)
    _openmp.GOMP_parallel(code.address, ctypes.addressof(packed), torch.get_num_threads(), 0)
