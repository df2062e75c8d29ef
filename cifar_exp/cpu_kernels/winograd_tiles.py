"""Winograd's transforms of tiles, and the products between them, as functions that numba compiles."""

from itertools import product
from typing import Any

import numpy as np
from numba import njit

from cifar_exp.cpu_kernels import llvm_vectors
from cifar_exp.cpu_kernels.llvm_vectors import BYTES, LANES, Builder, Value, inlined

GROUP = llvm_vectors.PAIR  # channels
POINTS = 16  # of a transformed tile
TILES = 12  # of a block of a convolution: two vectors of sums of each stay in registers
# Rows of B', A' and A. The last row of A is the negative of this one, which the end makes good.
OF_INPUTS = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
OF_PRODUCTS = ((1, 1, 1, 0), (0, 1, -1, -1))
OF_GRADIENTS = ((1, 0), (1, 1), (1, -1), (0, 1))
HALF = np.float32(0.5)
GRADIENT_ROWS = 8  # channels of inputs at a time in a gradient of weights, as many sums
# Bytes. Tiles lie a line of the cache further apart than they need, or all would want the same places in it.
WORD = 4  # two bfloat16, or a float32
FACTORS = BYTES  # a point of a group of channels, as bfloat16
PRODUCTS = 2 * BYTES  # the same as float32, or of two tiles
GROUP_BYTES = POINTS * FACTORS
TILE_PRODUCTS = POINTS * PRODUCTS + BYTES


def _transformed(builder: Builder, grid: list[list[Value]], matrix: Any) -> list[list[Value]]:
    """``matrix`` times ``grid`` times the transposed ``matrix``."""
    columns = [
        [llvm_vectors.combined(builder, column, signs) for signs in matrix] for column in zip(*grid, strict=True)
    ]
    return [[llvm_vectors.combined(builder, row, signs) for signs in matrix] for row in zip(*columns, strict=True)]


def _tile(builder: Builder, side: int, matrix: Any, place: tuple[Value, ...]) -> list[tuple[Value, Value]]:
    """A group of channels of ``side`` x ``side`` pixels, transformed: the points, even channels and odd ones.

    ``place``: address of the image's first pixel at this group, its height and width in pixels, its channels, how many
    of them are left, the tile's first row and column, which may lie outside, and the address of zeros.
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
def _transform_inputs(builder, image, height, width, channels, left, top, first, zeros, out):
    """To the points at ``out``, a line of the cache each."""
    place = (image, height, width, channels, left, top, first, zeros)
    _store(builder, _tile(builder, 4, OF_INPUTS, place), out)


@inlined
def _transform_inputs_behind(builder, image, height, width, channels, left, top, first, zeros, before, out):
    """The same for the second tile of a pair, whose first one is at ``before``."""
    place = (image, height, width, channels, left, top, first, zeros)
    _interleave(builder, _tile(builder, 4, OF_INPUTS, place), before, out)


@inlined
def _transform_gradients(builder, image, height, width, channels, left, top, first, zeros, sums, out):
    """The same for 2x2 gradients of outputs, which are added to the ``sums`` of this group's."""
    points = _tile(builder, 2, OF_GRADIENTS, (image, height, width, channels, left, top, first, zeros))
    _add_up(builder, points, sums)
    _store(builder, points, out)


@inlined
def _transform_gradients_behind(builder, image, height, width, channels, left, top, first, zeros, sums, before, out):
    """The same for the second tile of a pair, whose first one is at ``before``."""
    points = _tile(builder, 2, OF_GRADIENTS, (image, height, width, channels, left, top, first, zeros))
    _add_up(builder, points, sums)
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


def _add_up(builder: Builder, points: list[tuple[Value, Value]], sums: Value) -> None:
    """The second row and column of ``OF_GRADIENTS`` are sums."""
    for half, value in enumerate(points[5]):
        address = llvm_vectors.moved(builder, sums, BYTES * half)
        llvm_vectors.store(
            builder, builder.fadd(llvm_vectors.load(builder, llvm_vectors.FLOATS, address), value), address
        )


@inlined
def _transform_products(builder, products, bias, out, width, channels, rows_left, columns_left, left):
    """16 points of 32 channels -> 2x2 pixels of the outputs, those that the image has."""
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
def _multiply(builder, a, a_row, b, groups, out, out_row):
    """12 tiles x groups of inputs, times groups of inputs x 32 outputs, at one point."""
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
def _accumulate(builder, a, a_pair, b, b_pair, pairs, out, out_row):
    """8 inputs x pairs of tiles, times pairs of tiles x 32 outputs, at one point: added to what is at ``out``."""
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
    """To the variables ``sums``, a row of two vectors for each word at ``rows``, of it and two vectors at ``b``."""
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
def _fetch_ahead(image, top, first, height, width, channels):
    """Two rows of two pixels will be needed soon."""
    for row in range(top, min(top + 2, height)):
        start = image + 2 * channels * (row * width + first)
        for line in range(start, start + 4 * channels, BYTES):
            llvm_vectors.prefetch(line)
