"""Kernels that numba compiles, on torch's own threads.

A kernel is a function of the address of an array of int64: its shape, numbers, and the addresses of its arrays. numba
makes machine code of it, which it keeps on disk, when it is first used on a machine.

bfloat16 comes as uint16, since numpy has no such type; arithmetic is float32.
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

Kernel = Callable[[Any, int], Any]  # of the activations' element type and a variant; the function to compile

ELEMENTS = {torch.bfloat16: np.uint16, torch.float32: np.float32}
OPTIONS = {"fastmath": {"contract"}, "error_model": "numpy"}  # what divides by zero need not raise
# Every file of this folder, as it was when this was imported: a kernel may be made of functions from any of them.
SOURCES = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]

# The threads are those of the OpenMP library that torch calls: two pools would fight for the cores. One that was
# preloaded takes torch's calls, too.
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
cfunc(types.void())(lambda: None)  # what numba puts off until it first compiles is done before ranks are forked


@intrinsic
def pointer(_context, address):
    """What is at an address."""

    def generate(_context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@njit(inline="always")
def share(count):
    """First and past-the-end index of what this thread does."""
    return count * thread_number() // thread_count(), count * (thread_number() + 1) // thread_count()


def widened(value):
    """As float32."""


@overload(widened, inline="always")
def _overload_widened(value):
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


def narrowed(value, like):
    """A float32 rounded to what ``like`` holds, to the nearest, ties to even."""


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
    """What numba compiles for: system, processor, and those of its features that may be used."""
    system, processor, features = cpu_target.target_context.codegen().magic_tuple()
    return system, processor, frozenset(name[1:] for name in features.split(",") if name.startswith("+"))


@cache
def _origin() -> str:
    """Another one for another machine, or where what all kernels are made of has changed."""
    system, processor, features = target()
    machine = " ".join([system, processor, *sorted(features)])
    return sha256(b"".join([machine.encode(), *SOURCES])).hexdigest()[:12]


@cache
def compiled(kernel: Kernel, dtype: torch.dtype, variant: int = 0) -> Any:
    """A kernel's machine code, which takes an array of int64: its shape, numbers and the addresses of its arrays.

    Raises:
        Exception: what numba raises where it cannot compile it here.
    """
    function = kernel(ELEMENTS[dtype], variant)
    # numba keeps what has one name in one place, where processes that write at once would mix up what they wrote. It
    # looks at the kernel's own file to find out whether that changed.
    function.__qualname__ = f"{kernel.__name__}-{str(dtype).removeprefix('torch.')}-{variant}-{_origin()}"
    for on_disk in (True, False):  # no folder may be writable, none have room, or what is there be damaged
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
    """Run a kernel on all threads of torch's.

    Args:
        kernel: what it runs.
        shape: the integers that it asks for.
        numbers: the others, which it finds behind them.
        arrays: contiguous in the order that it takes; the first one's type is that of the activations.
        variant: which of the kernel's.
    """
    bits = struct.unpack(f"{len(numbers)}q", struct.pack(f"{len(numbers)}d", *numbers))
    values = (*shape, *bits, *(array.data_ptr() for array in arrays))
    packed = (ctypes.c_int64 * len(values))(*values)
    code = compiled(kernel, arrays[0].dtype, variant)
    _openmp.GOMP_parallel(code.address, ctypes.addressof(packed), torch.get_num_threads(), 0)
