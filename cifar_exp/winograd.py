"""3x3 convolutions and their gradients with 16 products in place of 36, for CPU ranks that multiply bfloat16.

Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks",
arXiv:1509.09308): a tile of 2x2 outputs follows from 4x4 inputs by products of as many transformed inputs and weights.
In one dimension, with * for element by element:

    outputs = A' ((G weights) * (B' inputs)),    gradient of weights = G' sum over tiles of ((A gradient) * (B' inputs))

Sums over channels or tiles are products of 16 matrices, of bfloat16 numbers, summed in float32. Transformed numbers are
rounded to bfloat16, inputs and gradients once more than in a direct convolution: errors are up to 2.6 times
as large. A gradient of weights is float32, where PyTorch rounds it; it is summed over each thread's share of the
tiles first, so its last digits depend on the number of threads.

Tiles are transformed in blocks that stay in a core's cache. Channels come in groups of 32, in which those with even
numbers are first: so a vector of bfloat16 becomes two of float32 and one again without moving lanes.
"""

from itertools import product
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from cifar_exp import vectors
from cifar_exp.native import (
    OPTIONS,
    launch,
    narrowed,
    pointer,
    share,
    target,
    thread_count,
    thread_number,
    wait_for_threads,
)
from cifar_exp.vectors import BYTES, LANES, Builder, Value, inlined

GROUP = vectors.PAIR  # channels
POINTS = 16  # of a transformed tile
TILES = 12  # of a block of a convolution: two vectors of sums of each stay in registers
TILE_PAIRS = 32  # of a block of a gradient of weights
FEWEST_TILES = 256  # a thread; with fewer, transforming weights and adding up threads takes longer than is saved
LEAST_SAVED = 1.2  # products of a direct convolution for each one of these, where groups and tiles are partly empty

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
    columns = [[vectors.combined(builder, column, signs) for signs in matrix] for column in zip(*grid, strict=True)]
    return [[vectors.combined(builder, row, signs) for signs in matrix] for row in zip(*columns, strict=True)]


def _tile(builder: Builder, side: int, matrix: Any, place: tuple[Value, ...]) -> list[tuple[Value, Value]]:
    """A group of channels of ``side`` x ``side`` pixels, transformed: the points, even channels and odd ones.

    ``place``: address of the image's first pixel at this group, its height and width in pixels, its channels, how many
    of them are left, the tile's first row and column, which may lie outside, and the address of zeros.
    """
    image, height, width, channels, left, top, first, zeros = place
    lanes = vectors.below(builder, left)
    grid: list[list[Value]] = []
    for i in range(side):
        grid.append([])
        for j in range(side):
            row, column = vectors.moved(builder, top, i), vectors.moved(builder, first, j)
            inside = builder.and_(builder.icmp_unsigned("<", row, height), builder.icmp_unsigned("<", column, width))
            pixel = builder.mul(builder.add(builder.mul(row, width), column), channels)
            address = builder.select(inside, vectors.moved(builder, image, (pixel, 2)), zeros)
            grid[-1].append(vectors.even_and_odd(builder, vectors.load_lanes(builder, address, lanes)))
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
        vectors.store(builder, vectors.rounded(builder, even, odd), vectors.moved(builder, out, FACTORS * point))


def _interleave(builder: Builder, points: list[tuple[Value, Value]], before: Value, out: Value) -> None:
    for point, (even, odd) in enumerate(points):
        other = vectors.load(builder, vectors.PACKED, vectors.moved(builder, before, FACTORS * point))
        both = vectors.interleaved(builder, other, vectors.rounded(builder, even, odd))
        for half, value in enumerate(both):
            vectors.store(builder, value, vectors.moved(builder, out, PRODUCTS * point + BYTES * half))


def _add_up(builder: Builder, points: list[tuple[Value, Value]], sums: Value) -> None:
    """The second row and column of ``OF_GRADIENTS`` are sums."""
    for half, value in enumerate(points[5]):
        address = vectors.moved(builder, sums, BYTES * half)
        vectors.store(builder, builder.fadd(vectors.load(builder, vectors.FLOATS, address), value), address)


@inlined
def _transform_products(builder, products, bias, out, width, channels, rows_left, columns_left, left):
    """16 points of 32 channels -> 2x2 pixels of the outputs, those that the image has."""
    lanes = vectors.below(builder, left)
    halves = []
    for half in range(2):
        address = vectors.moved(builder, products, BYTES * half)
        points = [
            vectors.load(builder, vectors.FLOATS, vectors.moved(builder, address, PRODUCTS * point))
            for point in range(POINTS)
        ]
        shift = vectors.load(builder, vectors.FLOATS, vectors.moved(builder, bias, BYTES * half), WORD)
        outputs = _transformed(builder, [points[4 * i : 4 * i + 4] for i in range(4)], OF_PRODUCTS)
        halves.append([[builder.fadd(value, shift) for value in row] for row in outputs])
    none = vectors.all_lanes(lanes.type, 0)
    for i, j in product(range(2), range(2)):
        inside = builder.and_(
            builder.icmp_signed(">", rows_left, vectors.number(i)),
            builder.icmp_signed(">", columns_left, vectors.number(j)),
        )
        pixel = vectors.moved(builder, vectors.number(j), (width, i))
        address = vectors.moved(builder, out, (builder.mul(pixel, channels), 2))
        value = vectors.rounded(builder, halves[0][i][j], halves[1][i][j])
        vectors.store_lanes(builder, value, address, builder.select(inside, lanes, none))


@inlined
def _multiply(builder, a, a_row, b, groups, out, out_row):
    """12 tiles x groups of inputs, times groups of inputs x 32 outputs, at one point."""
    sums = [[vectors.variable(builder, vectors.all_lanes(vectors.FLOATS, 0.0)) for _ in range(2)] for _ in range(TILES)]
    rows = [builder.mul(a_row, vectors.number(row)) for row in range(TILES)]
    with vectors.loop(builder, groups) as group:
        a_group, b_group = (
            vectors.moved(builder, a, (group, GROUP_BYTES)),
            vectors.moved(builder, b, (group, LANES * PRODUCTS)),
        )
        with vectors.loop(builder, vectors.number(LANES)) as pair:
            a_pair, b_pair = (
                vectors.moved(builder, a_group, (pair, WORD)),
                vectors.moved(builder, b_group, (pair, PRODUCTS)),
            )
            _add_products(builder, sums, [builder.add(a_pair, row) for row in rows], b_pair)
    for row, halves in enumerate(sums):
        for half, value in enumerate(halves):
            vectors.store(builder, builder.load(value), vectors.moved(builder, out, (out_row, row), BYTES * half))


@inlined
def _accumulate(builder, a, a_pair, b, b_pair, pairs, out, out_row):
    """8 inputs x pairs of tiles, times pairs of tiles x 32 outputs, at one point: added to what is at ``out``."""
    places = [
        [vectors.moved(builder, out, (out_row, row), BYTES * half) for half in range(2)] for row in range(GRADIENT_ROWS)
    ]
    sums = [
        [vectors.variable(builder, vectors.load(builder, vectors.FLOATS, place)) for place in halves]
        for halves in places
    ]
    with vectors.loop(builder, pairs) as pair:
        a_now, b_now = builder.add(a, builder.mul(pair, a_pair)), builder.add(b, builder.mul(pair, b_pair))
        rows = [vectors.moved(builder, a_now, WORD * row) for row in range(GRADIENT_ROWS)]
        _add_products(builder, sums, rows, b_now)
    for halves, addresses in zip(sums, places, strict=True):
        for value, address in zip(halves, addresses, strict=True):
            vectors.store(builder, builder.load(value), address)


def _add_products(builder: Builder, sums: list[list[Value]], rows: list[Value], b: Value) -> None:
    """To the variables ``sums``, a row of two vectors for each word at ``rows``, of it and two vectors at ``b``."""
    columns = [vectors.load(builder, vectors.WORDS, vectors.moved(builder, b, BYTES * half)) for half in range(2)]
    for row, halves in zip(rows, sums, strict=True):
        word = vectors.broadcast(builder, vectors.WORDS, vectors.load(builder, vectors.I32, row, WORD))
        for column, value in zip(columns, halves, strict=True):
            builder.store(vectors.add_products(builder, builder.load(value), word, column), value)


@njit(inline="always")
def _whole_groups(channels):
    """As many groups as there are begun ones."""
    return (channels + GROUP - 1) // GROUP


@njit(inline="always")
def _channel(place):
    """The one at this place."""
    within = place % GROUP
    return place - within + (2 * within if within < LANES else 2 * (within - LANES) + 1)


@njit(inline="always")
def _corner(tile, height, width):
    """Image, first row and first column of a tile's outputs."""
    down, across = (height + 1) // 2, (width + 1) // 2
    return tile // (down * across), 2 * (tile // across % down), 2 * (tile % across)


@njit(inline="always")
def _fetch_ahead(image, top, first, height, width, channels):
    """Two rows of two pixels will be needed soon."""
    for row in range(top, min(top + 2, height)):
        start = image + 2 * channels * (row * width + first)
        for line in range(start, start + 4 * channels, BYTES):
            vectors.prefetch(line)


@njit(inline="always")
def _of_weights(point, first, second, third):
    """A row of G times a column."""
    if point == 0:
        return first
    if point == 3:
        return third
    return HALF * (first + second + third) if point == 1 else HALF * (first - second + third)


@njit(**OPTIONS)
def _transform_weights(weight, transformed):
    """(outputs, 3, 3, inputs) -> (16, outputs, inputs)"""
    outputs, inputs = weight.shape[0], weight.shape[3]
    half = np.empty((4, 3, inputs), np.float32)
    begin, end = share(outputs)
    for k in range(begin, end):
        for i in range(4):
            for j in range(3):
                for c in range(inputs):
                    half[i, j, c] = _of_weights(i, weight[k, 0, j, c], weight[k, 1, j, c], weight[k, 2, j, c])
        for i in range(4):
            for j in range(4):
                for c in range(inputs):
                    value = _of_weights(j, half[i, 0, c], half[i, 1, c], half[i, 2, c])
                    transformed[4 * i + j, k, c] = narrowed(value, transformed)


@njit(inline="always")
def _turned(point):
    """The point of a kernel that is turned by half a turn: what is first in a direction is last there."""
    i, j = point // 4, point % 4
    return 4 * (i if i % 3 else 3 - i) + (j if j % 3 else 3 - j)


def convolved(_element: Any, _variant: int) -> Any:
    """Of (images, height, width, inputs, outputs, backward): ``x``, weight as (outputs, 3, 3, inputs), bias -> ``y``.

    ``bias`` is of whole groups. ``backward``: the gradient of inputs; ``x`` is that of outputs, the weight (inputs, 3,
    3, outputs). The rest is room: zeros; transformed weights as they come, (16, outputs, inputs), and as factors,
    (groups of outputs, 16, half the inputs, 32 outputs) words; for each thread tiles and products.
    """

    def kernel(p):
        images, height, width, inputs, outputs, backward = p[0], p[1], p[2], p[3], p[4], p[5]
        x, bias, y, zeros = p[6], p[8], p[9], p[10]
        groups, blocks = _whole_groups(inputs), _whole_groups(outputs)
        if backward:
            weight = carray(pointer(p[7]), (inputs, 3, 3, outputs), np.float32)
            transformed = carray(pointer(p[11]), (POINTS, inputs, outputs), np.uint16)
        else:
            weight = carray(pointer(p[7]), (outputs, 3, 3, inputs), np.float32)
            transformed = carray(pointer(p[11]), (POINTS, outputs, inputs), np.uint16)
        factors = carray(pointer(p[12]), (blocks, POINTS, groups * LANES, GROUP), np.uint32)
        vectors.align_stack()
        _transform_weights(weight, transformed)
        wait_for_threads()
        begin, end = share(blocks * POINTS)
        for this in range(begin, end):
            block, point = this // POINTS, this % POINTS
            k, count = GROUP * block, min(GROUP, outputs - GROUP * block)
            for pair in range(groups * LANES):
                c, d = _channel(2 * pair), _channel(2 * pair + 1)
                for lane in range(count):
                    low = high = np.uint16(0)
                    if c < inputs:
                        low = transformed[_turned(point), c, k + lane] if backward else transformed[point, k + lane, c]
                    if d < inputs:
                        high = transformed[_turned(point), d, k + lane] if backward else transformed[point, k + lane, d]
                    factors[block, point, pair, lane] = np.uint32(low) | np.uint32(np.uint32(high) << np.uint32(16))
        wait_for_threads()
        tile_bytes = groups * GROUP_BYTES + BYTES
        tiles = p[13] + thread_number() * TILES * tile_bytes
        products = p[14] + thread_number() * TILES * TILE_PRODUCTS
        image_bytes = 2 * height * width * inputs
        begin, end = share(images * ((height + 1) // 2) * ((width + 1) // 2))
        for first in range(begin, end, TILES):
            count = min(TILES, end - first)
            for tile in range(count):
                n, i, j = _corner(first + tile, height, width)
                for c in range(0, inputs, GROUP):
                    _transform_inputs(
                        x + n * image_bytes + 2 * c, height, width, inputs, inputs - c, i - 1, j - 1, zeros,
                        tiles + tile * tile_bytes + c // GROUP * GROUP_BYTES,
                    )  # fmt: skip
            for block in range(blocks):
                k = block * GROUP
                for point in range(POINTS):
                    if block == 0:
                        for tile in range(count * point // POINTS, count * (point + 1) // POINTS):
                            n, i, j = _corner(first + TILES + tile, height, width)
                            if n < images:
                                _fetch_ahead(x + n * image_bytes, i + 1, j + 1, height, width, inputs)
                    _multiply(
                        tiles + point * FACTORS, tile_bytes,
                        p[12] + (block * POINTS + point) * groups * LANES * PRODUCTS, groups,
                        products + point * PRODUCTS, TILE_PRODUCTS,
                    )  # fmt: skip
                for tile in range(count):
                    n, i, j = _corner(first + tile, height, width)
                    _transform_products(
                        products + tile * TILE_PRODUCTS, bias + WORD * k,
                        y + 2 * (((n * height + i) * width + j) * outputs + k),
                        width, outputs, height - i, width - j, outputs - k,
                    )  # fmt: skip

    return kernel


def derived(_element: Any, _variant: int) -> Any:
    """Of (images, height, width, inputs, outputs): ``x`` and the gradient of outputs -> that of the weight as (outputs,
    3, 3, inputs) and that of the bias, (outputs,).

    The rest is room: zeros; for each thread a tile, tiles of inputs and of gradients in pairs, sums over them as (16,
    inputs, outputs) and sums of gradients; channels are whole groups there.
    """

    def kernel(p):
        images, height, width, inputs, outputs = p[0], p[1], p[2], p[3], p[4]
        x, gradient, zeros = p[5], p[6], p[9]
        groups, blocks = _whole_groups(inputs), _whole_groups(outputs)
        rows, columns = groups * GROUP, blocks * GROUP
        thread, threads = thread_number(), thread_count()
        x_bytes, g_bytes = 2 * groups * GROUP_BYTES + BYTES, 2 * blocks * GROUP_BYTES + BYTES
        before = p[10] + thread * GROUP_BYTES
        x_tiles, g_tiles = p[11] + thread * TILE_PAIRS * x_bytes, p[12] + thread * TILE_PAIRS * g_bytes
        every_sum = carray(pointer(p[13]), (threads, POINTS, rows, columns), np.float32)
        every_bias = carray(pointer(p[14]), (threads, columns), np.float32)
        every_sum[thread] = every_bias[thread] = np.float32(0)
        sums, bias_sums = p[13] + thread * POINTS * rows * columns * WORD, p[14] + thread * columns * WORD
        vectors.align_stack()
        x_image, g_image = 2 * height * width * inputs, 2 * height * width * outputs
        tiles = images * ((height + 1) // 2) * ((width + 1) // 2)
        begin, end = share((tiles + 1) // 2)
        for first in range(begin, end, TILE_PAIRS):
            count = min(TILE_PAIRS, end - first)
            for pair in range(count):
                n, i, j = _corner(2 * (first + pair), height, width)
                m, k, q = _corner(2 * (first + pair) + 1, height, width)
                there = height if m < images else 0  # of an odd number of tiles the last one has no other
                for c in range(0, inputs, GROUP):
                    left = inputs - c
                    _transform_inputs(x + n * x_image + 2 * c, height, width, inputs, left, i - 1, j - 1, zeros, before)
                    _transform_inputs_behind(
                        x + m * x_image + 2 * c, there, width, inputs, left, k - 1, q - 1, zeros, before,
                        x_tiles + pair * x_bytes + 2 * c // GROUP * GROUP_BYTES,
                    )  # fmt: skip
                for c in range(0, outputs, GROUP):
                    left, bias = outputs - c, bias_sums + WORD * c
                    _transform_gradients(
                        gradient + n * g_image + 2 * c, height, width, outputs, left, i, j, zeros, bias, before
                    )  # fmt: skip
                    _transform_gradients_behind(
                        gradient + m * g_image + 2 * c, there, width, outputs, left, k, q, zeros, bias, before,
                        g_tiles + pair * g_bytes + 2 * c // GROUP * GROUP_BYTES,
                    )  # fmt: skip
            for point in range(POINTS):
                for tile in range(2 * count * point // POINTS, 2 * count * (point + 1) // POINTS):
                    n, i, j = _corner(2 * (first + TILE_PAIRS) + tile, height, width)
                    if n < images:
                        _fetch_ahead(x + n * x_image, i + 1, j + 1, height, width, inputs)
                        _fetch_ahead(gradient + n * g_image, i, j, height, width, outputs)
                for k in range(0, columns, GROUP):
                    for c in range(0, rows, GRADIENT_ROWS):
                        _accumulate(
                            x_tiles + 2 * (c // GROUP) * GROUP_BYTES + point * PRODUCTS + c % GROUP * WORD, x_bytes,
                            g_tiles + 2 * (k // GROUP) * GROUP_BYTES + point * PRODUCTS, g_bytes,
                            count, sums + ((point * rows + c) * columns + k) * WORD, columns * WORD,
                        )  # fmt: skip
        wait_for_threads()
        weights = carray(pointer(p[7]), (outputs, 3, 3, inputs), np.float32)
        biases = carray(pointer(p[8]), outputs, np.float32)
        grid, half = np.empty((POINTS, columns), np.float32), np.empty((3, 4, columns), np.float32)
        begin, end = share(rows)
        for row in range(begin, end):
            c = _channel(row)
            for point in range(POINTS):
                grid[point] = every_sum[0, point, row]
                for other in range(1, threads):
                    grid[point] += every_sum[other, point, row]
            for j in range(4):
                for k in range(columns):
                    middle = HALF * (grid[4 + j, k] + grid[8 + j, k])
                    half[0, j, k], half[2, j, k] = grid[j, k] + middle, middle - grid[12 + j, k]
                    half[1, j, k] = HALF * (grid[4 + j, k] - grid[8 + j, k])
            for i in range(3):
                for column in range(columns):
                    k = _channel(column)
                    if c < inputs and k < outputs:
                        middle = HALF * (half[i, 1, column] + half[i, 2, column])
                        weights[k, i, 0, c], weights[k, i, 2, c] = (
                            half[i, 0, column] + middle,
                            middle - half[i, 3, column],
                        )
                        weights[k, i, 1, c] = HALF * (half[i, 1, column] - half[i, 2, column])
        begin, end = share(columns)
        for column in range(begin, end):
            k = _channel(column)
            if k < outputs:
                biases[k] = np.float32(0)
                for other in range(threads):
                    biases[k] += every_bias[other, column]

    return kernel


def pays() -> bool:
    """Whether there are the instructions, and none with which oneDNN's direct convolutions are faster still."""
    features = target()[2]
    return features.issuperset(vectors.NEEDED) and "amx-bf16" not in features


def fits(inputs: Tensor, weight: Tensor) -> bool:
    """Whether :func:`convolve` takes ``inputs``, (N, C, H, W) bfloat16 and channels-last, and ``weight``, and pays."""
    images, channels, height, width = inputs.shape
    tiles = ((height + 1) // 2) * ((width + 1) // 2)
    padded = POINTS * tiles * GROUP**2 * -(-channels // GROUP) * -(-len(weight) // GROUP)
    return (
        channels == weight.shape[1]
        and weight.dtype == torch.float32
        and weight.is_contiguous(memory_format=torch.channels_last)
        and 9 * height * width * channels * len(weight) >= LEAST_SAVED * padded
        and images * tiles >= FEWEST_TILES * torch.get_num_threads()
    )


def convolve(inputs: Tensor, weight: Tensor, bias: Tensor | None, *, backward: bool = False) -> Tensor:
    """A convolution of stride 1 with a border of zeros, (N, C, H, W) -> (N, K, H, W), bfloat16 and channels-last.

    Args:
        inputs: (N, C, H, W) bfloat16, channels-last.
        weight: (K, C, 3, 3) float32, channels-last.
        bias: (K,) float32.
        backward: ``inputs`` are the gradient of outputs, (N, K, H, W), and what is returned that of inputs.
    """
    images, channels, height, width = inputs.shape
    outputs = weight.shape[1 if backward else 0]
    groups, blocks, threads = -(-channels // GROUP), -(-outputs // GROUP), torch.get_num_threads()
    result = torch.empty((images, outputs, height, width), dtype=torch.bfloat16, memory_format=torch.channels_last)
    padded = torch.zeros(blocks * GROUP, dtype=torch.float32)
    if bias is not None:
        padded[:outputs] = bias
    room = (
        _zeros(),
        _room(POINTS * channels * outputs * 2),
        _room(blocks * POINTS * groups * LANES * PRODUCTS),
        _room(threads * TILES * (groups * GROUP_BYTES + BYTES)),
        _room(threads * TILES * TILE_PRODUCTS),
    )
    shape = (images, height, width, channels, outputs, int(backward))
    launch(convolved, shape, inputs, weight, padded, result, *room)
    return result


def gradients(inputs: Tensor, gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Those of a convolution's weight and bias, float32, from the ``gradient`` of its outputs, (N, K, H, W).

    Both are bfloat16 and channels-last. Sums are over each thread's share of the images first.
    """
    images, channels, height, width = inputs.shape
    outputs = gradient.shape[1]
    groups, blocks, threads = -(-channels // GROUP), -(-outputs // GROUP), torch.get_num_threads()
    results = torch.empty_like(weight), torch.empty(outputs, dtype=torch.float32)
    room = (
        _zeros(),
        _room(threads * GROUP_BYTES),
        _room(threads * TILE_PAIRS * (2 * groups * GROUP_BYTES + BYTES)),
        _room(threads * TILE_PAIRS * (2 * blocks * GROUP_BYTES + BYTES)),
        _room(threads * POINTS * groups * blocks * GROUP**2 * WORD),
        _room(threads * blocks * GROUP * WORD),
    )
    launch(derived, (images, height, width, channels, outputs), inputs, gradient, *results, *room)
    return results


def _zeros() -> Tensor:
    """A group of channels outside of an image."""
    return torch.zeros(GROUP, dtype=torch.bfloat16)


def _room(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)
