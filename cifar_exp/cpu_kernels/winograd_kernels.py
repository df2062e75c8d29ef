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

from typing import Any

import numpy as np
from numba import carray, njit

from cifar_exp.cpu_kernels import llvm_vectors
from cifar_exp.cpu_kernels.llvm_vectors import BYTES, LANES
from cifar_exp.cpu_kernels.numba_runtime import (
    OPTIONS,
    narrowed,
    pointer,
    share,
    thread_count,
    thread_number,
    wait_for_threads,
)
from cifar_exp.cpu_kernels.winograd_tiles import (
    FACTORS,
    GRADIENT_ROWS,
    GROUP,
    GROUP_BYTES,
    HALF,
    POINTS,
    PRODUCTS,
    TILE_PRODUCTS,
    TILES,
    WORD,
    _accumulate,
    _fetch_ahead,
    _multiply,
    _transform_gradients,
    _transform_gradients_behind,
    _transform_inputs,
    _transform_inputs_behind,
    _transform_products,
)

TILE_PAIRS = 32  # of a block of a gradient of weights


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
        llvm_vectors.align_stack()
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
        llvm_vectors.align_stack()
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
