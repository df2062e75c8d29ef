"""Functions for kernels: Winograd's transforms of tiles, and products of transformed tiles."""

from itertools import product
from typing import Any

import numpy as np
from numba import njit

from cifar_exp.cpu_kernels import llvm_vectors
from cifar_exp.cpu_kernels.llvm_vectors import BYTES, LANES, Builder, Value, inlined

GROUP = llvm_vectors.PAIR  # channels
POINTS = 16  # of a transformed tile
TILES = 12  # of a convolution at a time; their sums, two vectors each, fit into registers
# Rows of B', A' and A. The last row of A is negated here; the last transform corrects the sign.
OF_INPUTS = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
OF_PRODUCTS = ((1, 1, 1, 0), (0, 1, -1, -1))
OF_GRADIENTS = ((1, 0), (1, 1), (1, -1), (0, 1))
HALF = np.float32(0.5)
GRADIENT_ROWS = 8  # input channels of a weight gradient at a time
# Bytes. Tiles are padded by one cache line; otherwise all would map to the same cache sets.
WORD = 4  # two bfloat16, or a float32
FACTORS = BYTES  # one point of a group of channels as bfloat16
PRODUCTS = 2 * BYTES  # one point of a group of channels as float32, or as bfloat16 of two tiles
GROUP_BYTES = POINTS * FACTORS
TILE_PRODUCTS = POINTS * PRODUCTS + BYTES


def _transformed(builder: Builder, grid: list[list[Value]], matrix: Any) -> list[list[Value]]:
    """``matrix`` times ``grid`` times the transposed ``matrix``."""
    columns = [
        [llvm_vectors.combined(builder, column, signs) for signs in matrix] for column in zip(*grid, strict=True)
    ]
    return [[llvm_vectors.combined(builder, row, signs) for signs in matrix] for row in zip(*columns, strict=True)]


def _tile(builder: Builder, side: int, matrix: Any, place: tuple[Value, ...]) -> list[tuple[Value, Value]]:
    """Transform ``side`` x ``side`` pixels of a group of channels. Returns the points: even channels, odd channels.

    ``place``: address of this group in the image's first pixel; height, width and channels of the image; number of
    channels from this group on; first row and column of the tile, possibly outside the image; address of zeros.
    """
    image, height, width, channels, left, top, first, zeros = place
    lanes = llvm_vectors.below(builder, left)
    grid: list[list[Value]] = []
    for i in range(side):
        grid.append([])
        for j in range(side):
            row, column = llvm_vectors.moved(builder, top, i), llvm_vectors.moved(builder, first, j)
            inside = builder.and_(builder.icmp_unsigned("<", row, height), builder.icmp_unsigned("<", column, width))
            pixel = builder.mul(builder.add(builder.mul(row, width), column), channels)
            address = builder.select(inside, llvm_vectors.moved(builder, image, (pixel, 2)), zeros)
            grid[-1].append(llvm_vectors.even_and_odd(builder, llvm_vectors.load_lanes(builder, address, lanes)))
    halves = [_transformed(builder, [[pixel[half] for pixel in row] for row in grid], matrix) for half in range(2)]
    return [(halves[0][i][j], halves[1][i][j]) for i, j in product(range(4), range(4))]


@inlined
def transform_inputs(builder, image, height, width, channels, left, top, first, zeros, out):
    """Transform 4x4 inputs of a group of channels. ``out``: 16 points, a cache line each."""
    place = (image, height, width, channels, left, top, first, zeros)
    _store(builder, _tile(builder, 4, OF_INPUTS, place), out)


@inlined
def transform_second_inputs(builder, image, height, width, channels, left, top, first, zeros, before, out):
    """Transform the second tile of a pair, and interleave it with the first one, which is at ``before``."""
    place = (image, height, width, channels, left, top, first, zeros)
    _interleave(builder, _tile(builder, 4, OF_INPUTS, place), before, out)


@inlined
def transform_gradients(builder, image, height, width, channels, left, top, first, zeros, sums, out):
    """Transform 2x2 gradients of outputs. They are also added to ``sums``, the bias gradient of this group."""
    points = _tile(builder, 2, OF_GRADIENTS, (image, height, width, channels, left, top, first, zeros))
    _add_to_bias(builder, points, sums)
    _store(builder, points, out)


@inlined
def transform_second_gradients(builder, image, height, width, channels, left, top, first, zeros, sums, before, out):
    """Transform the second tile of a pair, and interleave it with the first one, which is at ``before``."""
    points = _tile(builder, 2, OF_GRADIENTS, (image, height, width, channels, left, top, first, zeros))
    _add_to_bias(builder, points, sums)
    _interleave(builder, points, before, out)


def _store(builder: Builder, points: list[tuple[Value, Value]], out: Value) -> None:
    for point, (even, odd) in enumerate(points):
        llvm_vectors.store(
            builder, llvm_vectors.rounded(builder, even, odd), llvm_vectors.moved(builder, out, FACTORS * point)
        )


def _interleave(builder: Builder, points: list[tuple[Value, Value]], before: Value, out: Value) -> None:
    for point, (even, odd) in enumerate(points):
        other = llvm_vectors.load(builder, llvm_vectors.PACKED, llvm_vectors.moved(builder, before, FACTORS * point))
        both = llvm_vectors.interleaved(builder, other, llvm_vectors.rounded(builder, even, odd))
        for half, value in enumerate(both):
            llvm_vectors.store(builder, value, llvm_vectors.moved(builder, out, PRODUCTS * point + BYTES * half))


def _add_to_bias(builder: Builder, points: list[tuple[Value, Value]], sums: Value) -> None:
    """Add the sum of a tile's gradients to ``sums``. That sum is point 5, because row 1 of A is (1, 1)."""
    for half, value in enumerate(points[5]):
        address = llvm_vectors.moved(builder, sums, BYTES * half)
        llvm_vectors.store(
            builder, builder.fadd(llvm_vectors.load(builder, llvm_vectors.FLOATS, address), value), address
        )


@inlined
def transform_products(builder, products, bias, out, width, channels, rows_left, columns_left, left):
    """Transform 16 points of 32 channels to 2x2 outputs. Outputs outside the image are not written."""
    lanes = llvm_vectors.below(builder, left)
    halves = []
    for half in range(2):
        address = llvm_vectors.moved(builder, products, BYTES * half)
        points = [
            llvm_vectors.load(builder, llvm_vectors.FLOATS, llvm_vectors.moved(builder, address, PRODUCTS * point))
            for point in range(POINTS)
        ]
        shift = llvm_vectors.load(builder, llvm_vectors.FLOATS, llvm_vectors.moved(builder, bias, BYTES * half), WORD)
        outputs = _transformed(builder, [points[4 * i : 4 * i + 4] for i in range(4)], OF_PRODUCTS)
        halves.append([[builder.fadd(value, shift) for value in row] for row in outputs])
    none = llvm_vectors.all_lanes(lanes.type, 0)
    for i, j in product(range(2), range(2)):
        inside = builder.and_(
            builder.icmp_signed(">", rows_left, llvm_vectors.number(i)),
            builder.icmp_signed(">", columns_left, llvm_vectors.number(j)),
        )
        pixel = llvm_vectors.moved(builder, llvm_vectors.number(j), (width, i))
        address = llvm_vectors.moved(builder, out, (builder.mul(pixel, channels), 2))
        value = llvm_vectors.rounded(builder, halves[0][i][j], halves[1][i][j])
        llvm_vectors.store_lanes(builder, value, address, builder.select(inside, lanes, none))


@inlined
def multiply(builder, a, a_row, b, groups, out, out_row):
    """Matrix product at one point: (12 tiles, inputs) times (inputs, 32 outputs)."""
    sums = [
        [llvm_vectors.variable(builder, llvm_vectors.all_lanes(llvm_vectors.FLOATS, 0.0)) for _ in range(2)]
        for _ in range(TILES)
    ]
    rows = [builder.mul(a_row, llvm_vectors.number(row)) for row in range(TILES)]
    with llvm_vectors.loop(builder, groups) as group:
        a_group, b_group = (
            llvm_vectors.moved(builder, a, (group, GROUP_BYTES)),
            llvm_vectors.moved(builder, b, (group, LANES * PRODUCTS)),
        )
        with llvm_vectors.loop(builder, llvm_vectors.number(LANES)) as pair:
            a_pair, b_pair = (
                llvm_vectors.moved(builder, a_group, (pair, WORD)),
                llvm_vectors.moved(builder, b_group, (pair, PRODUCTS)),
            )
            _add_products(builder, sums, [builder.add(a_pair, row) for row in rows], b_pair)
    for row, halves in enumerate(sums):
        for half, value in enumerate(halves):
            llvm_vectors.store(
                builder, builder.load(value), llvm_vectors.moved(builder, out, (out_row, row), BYTES * half)
            )


@inlined
def accumulate(builder, a, a_pair, b, b_pair, pairs, out, out_row):
    """Matrix product at one point, added to ``out``: (8 inputs, tiles) times (tiles, 32 outputs), in pairs of tiles."""
    places = [
        [llvm_vectors.moved(builder, out, (out_row, row), BYTES * half) for half in range(2)]
        for row in range(GRADIENT_ROWS)
    ]
    sums = [
        [llvm_vectors.variable(builder, llvm_vectors.load(builder, llvm_vectors.FLOATS, place)) for place in halves]
        for halves in places
    ]
    with llvm_vectors.loop(builder, pairs) as pair:
        a_now, b_now = builder.add(a, builder.mul(pair, a_pair)), builder.add(b, builder.mul(pair, b_pair))
        rows = [llvm_vectors.moved(builder, a_now, WORD * row) for row in range(GRADIENT_ROWS)]
        _add_products(builder, sums, rows, b_now)
    for halves, addresses in zip(sums, places, strict=True):
        for value, address in zip(halves, addresses, strict=True):
            llvm_vectors.store(builder, builder.load(value), address)


def _add_products(builder: Builder, sums: list[list[Value]], rows: list[Value], b: Value) -> None:
    """Add to ``sums`` the products of each word in ``rows`` and the two vectors at ``b``."""
    columns = [
        llvm_vectors.load(builder, llvm_vectors.WORDS, llvm_vectors.moved(builder, b, BYTES * half))
        for half in range(2)
    ]
    for row, halves in zip(rows, sums, strict=True):
        word = llvm_vectors.broadcast(
            builder, llvm_vectors.WORDS, llvm_vectors.load(builder, llvm_vectors.I32, row, WORD)
        )
        for column, value in zip(columns, halves, strict=True):
            builder.store(llvm_vectors.add_products(builder, builder.load(value), word, column), value)


@njit(inline="always")
def prefetch_tile(image, top, first, height, width, channels):
    """Prefetch the 2x2 pixels of an image that a later tile needs."""
    for row in range(top, min(top + 2, height)):
        start = image + 2 * channels * (row * width + first)
        for line in range(start, start + 4 * channels, BYTES):
            llvm_vectors.prefetch(line)
