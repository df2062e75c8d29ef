"""Vector instructions for kernels whose loops LLVM does not vectorize.

:func:`inlined` turns a function that writes LLVM code into one that kernels call. Addresses and numbers are int64. A
vector has 512 bits: 16 float32, or 32 bfloat16 as int16.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

Value = Any  # an LLVM value, known when the kernel runs
Builder = Any

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
LANES = 16
PAIR = 2 * LANES
FLOATS = ir.VectorType(ir.FloatType(), LANES)
WORDS = ir.VectorType(I32, LANES)  # two bfloat16 each
PACKED = ir.VectorType(I16, PAIR)
BYTES = 64  # size of a vector, and of a cache line
NARROW = [ir.Constant(I32, 2)]  # the alignment of a bfloat16
NEEDED = ("avx512bf16", "avx512bw")  # processor features


def inlined(write: Callable[..., None]) -> Any:
    """Make a function for kernels. Its arguments are int64; ``write(builder, *values)`` writes its LLVM code."""
    signature = inspect.signature(write)
    taken = types.none(*[types.int64] * (len(signature.parameters) - 1))

    def define(_context, *_arguments):
        def generate(context, builder, _signature, arguments):
            write(builder, *arguments)
            return context.get_dummy_value()

        return taken, generate

    define.__name__ = write.__name__
    vars(define)["__signature__"] = signature
    return intrinsic(define)


@contextmanager
def loop(builder: Builder, count: Value) -> Iterator[Value]:
    """Repeat the code that is written inside ``count`` times; yields the index."""
    with cgutils.for_range(builder, count, intp=I64) as now:
        yield now.index


def variable(builder: Builder, value: Value) -> Value:
    """A variable with an initial value. LLVM keeps it in a register."""
    return cgutils.alloca_once_value(builder, value)


@inlined
def align_stack(builder):
    """Align spilled vectors to cache lines. Call it once in a kernel.

    LLVM aligns a function's stack only if it sees an aligned object before register allocation.
    """
    place = cgutils.alloca_once(builder, I64)
    place.align = BYTES
    _fetch(builder, builder.bitcast(place, ir.PointerType()))


@inlined
def prefetch(builder, address):
    """Prefetch the cache line at an address, for reading."""
    _fetch(builder, builder.inttoptr(address, ir.PointerType()))


def _fetch(builder: Builder, where: Value) -> None:
    call(builder, "llvm.prefetch.p0", ir.VoidType(), where, *[ir.Constant(I32, value) for value in (0, 3, 1)])


def number(value: int) -> Value:
    """A constant int64."""
    return ir.Constant(I64, value)


def all_lanes(kind: Any, value: float) -> Value:
    """A vector with one constant in all lanes."""
    return ir.Constant(kind, [value] * kind.count)


def call(builder: Builder, name: str, returns: Any, *arguments: Value) -> Value:
    """Call an LLVM intrinsic."""
    kind = ir.FunctionType(returns, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def moved(builder: Builder, address: Value, *steps: tuple[Value, int] | int) -> Value:
    """An address plus offsets in bytes. Each offset is a constant, or a value and its constant factor."""
    for step in steps:
        by = number(step) if isinstance(step, int) else builder.mul(step[0], number(step[1]))
        address = builder.add(address, by)
    return address


def load(builder: Builder, kind: Any, address: Value, align: int = BYTES) -> Value:
    """Load a value of type ``kind`` from an address."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)


def store(builder: Builder, value: Value, address: Value) -> None:
    """Store a vector at the beginning of a cache line."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=BYTES)


def broadcast(builder: Builder, kind: Any, value: Value) -> Value:
    """A vector with one value in all lanes."""
    none = ir.Constant(kind, ir.Undefined)
    alone = builder.insert_element(none, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(alone, none, all_lanes(ir.VectorType(I32, kind.count), 0))


def below(builder: Builder, count: Value) -> Value:
    """A mask of 32 lanes: those before ``count``."""
    kind = ir.VectorType(I32, PAIR)
    counts = broadcast(builder, kind, builder.trunc(count, I32))
    return builder.icmp_signed("<", ir.Constant(kind, list(range(PAIR))), counts)


def load_lanes(builder: Builder, address: Value, lanes: Value) -> Value:
    """Load the masked ``lanes`` of 32 bfloat16. Other lanes are zero; their memory is not read."""
    where = builder.inttoptr(address, ir.PointerType())
    return call(builder, "llvm.masked.load.v32i16.p0", PACKED, where, *NARROW, lanes, all_lanes(PACKED, 0))


def store_lanes(builder: Builder, value: Value, address: Value, lanes: Value) -> None:
    """Store the masked ``lanes`` of 32 bfloat16."""
    where = builder.inttoptr(address, ir.PointerType())
    call(builder, "llvm.masked.store.v32i16.p0", ir.VoidType(), value, where, *NARROW, lanes)


def even_and_odd(builder: Builder, value: Value) -> tuple[Value, Value]:
    """32 bfloat16 as two vectors of float32: even lanes, odd lanes."""
    words = builder.bitcast(value, WORDS)
    even = builder.shl(words, all_lanes(WORDS, 16))
    odd = builder.and_(words, all_lanes(WORDS, -1 << 16))
    return builder.bitcast(even, FLOATS), builder.bitcast(odd, FLOATS)


def rounded(builder: Builder, first: Value, second: Value) -> Value:
    """Round two float32 vectors to one bfloat16 vector, the second after the first."""
    return call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", PACKED, second, first)


def interleaved(builder: Builder, first: Value, second: Value) -> tuple[Value, Value]:
    """Two vectors of words. A word is a bfloat16 of the first vector and the one of the second in the same lane."""
    kind = ir.VectorType(I32, PAIR)
    orders = [[LANES * half + lane // 2 + PAIR * (lane % 2) for lane in range(PAIR)] for half in range(2)]
    low, high = (builder.shuffle_vector(first, second, ir.Constant(kind, order)) for order in orders)
    return low, high


def add_products(builder: Builder, sums: Value, first: Value, second: Value) -> Value:
    """Add both bfloat16 products of each pair of words to ``sums``, float32."""
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, sums, first, second)


def combined(builder: Builder, values: Sequence[Value], signs: Sequence[int]) -> Value:
    """The sum of ``values`` times ``signs``. Signs are 1, 0 or -1; at least one is 1."""
    added = [value for value, sign in zip(values, signs, strict=True) if sign == 1]
    result = added[0]
    for value in added[1:]:
        result = builder.fadd(result, value)
    for value, sign in zip(values, signs, strict=True):
        if sign == -1:
            result = builder.fsub(result, value)
    return result
