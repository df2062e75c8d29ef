"""The kernel for Winograd's gradients of weight and bias. ``winograd.py`` explains the method."""

from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit

from cifar_exp.cpu_kernels import llvm_vectors
from cifar_exp.cpu_kernels.llvm_vectors import BYTES
from cifar_exp.cpu_kernels.numba_runtime import (
    arguments,
    pointer,
    share,
    thread_count,
    thread_number,
    wait_for_threads,
)
from cifar_exp.cpu_kernels.winograd_layout import channel_at, corner, group_count, tile_count
from cifar_exp.cpu_kernels.winograd_tiles import (
    GRADIENT_ROWS,
    GROUP,
    GROUP_BYTES,
    HALF,
    POINTS,
    PRODUCTS,
    WORD,
    accumulate,
    prefetch_tile,
    transform_gradients,
    transform_inputs,
    transform_second_gradients,
    transform_second_inputs,
)

TILE_PAIRS = 32  # transformed at a time


class WeightGradientArguments(NamedTuple):
    """What :func:`weight_gradient` takes: numbers, then addresses of arrays. Images are bfloat16, channels-last.

    In the workspaces, channels are rounded up to whole groups.

    Attributes:
        images: how many.
        height: of an image.
        width: of an image.
        inputs: channels of ``x``.
        outputs: channels of ``gradient``.
        x: (images, height, width, inputs), the input of the convolution.
        gradient: (images, height, width, outputs), the gradient of its output.
        weight: (outputs, 3, 3, inputs) float32, gets the gradient of the weight.
        bias: (outputs,) float32, gets the gradient of the bias.
        zeros: a group of zeros, the padding.
        tile: one group of a transformed tile per thread, workspace.
        input_tiles: ``TILE_PAIRS`` pairs of transformed input tiles per thread, workspace.
        gradient_tiles: the same number of pairs of transformed gradients, workspace.
        weight_sums: (threads, 16, inputs, outputs) float32, workspace.
        bias_sums: (threads, outputs) float32, workspace.
    """

    images: int
    height: int
    width: int
    inputs: int
    outputs: int
    x: int
    gradient: int
    weight: int
    bias: int
    zeros: int
    tile: int
    input_tiles: int
    gradient_tiles: int
    weight_sums: int
    bias_sums: int


_arguments = arguments(WeightGradientArguments)


def weight_gradient(_element: Any, _variant: int) -> Any:
    """The gradients of weight and bias. See :class:`WeightGradientArguments`."""

    def kernel(packed):
        a = _arguments(packed)
        rows, columns = group_count(a.inputs) * GROUP, group_count(a.outputs) * GROUP
        thread, threads = thread_number(), thread_count()
        weight_sums = carray(pointer(a.weight_sums), (threads, POINTS, rows, columns), np.float32)
        bias_sums = carray(pointer(a.bias_sums), (threads, columns), np.float32)
        weight_sums[thread] = bias_sums[thread] = np.float32(0)
        llvm_vectors.align_stack()
        begin, end = share((tile_count(a.images, a.height, a.width) + 1) // 2)
        for first in range(begin, end, TILE_PAIRS):
            count = min(TILE_PAIRS, end - first)
            _transform_pairs(a, first, count, thread)
            _accumulate_pairs(a, first, count, thread)
        wait_for_threads()
        _write_weights(a, weight_sums, threads)
        _write_biases(a, bias_sums, threads)

    return kernel


@njit(inline="always")
def _pair_bytes(channels):
    """Bytes of a pair of transformed tiles."""
    return 2 * group_count(channels) * GROUP_BYTES + BYTES


@njit(inline="always")
def _transform_pairs(a, first, count, thread):
    """Transform ``count`` pairs of input and gradient tiles, and add the gradients to the bias sums."""
    x_bytes, g_bytes = _pair_bytes(a.inputs), _pair_bytes(a.outputs)
    x_image, g_image = 2 * a.height * a.width * a.inputs, 2 * a.height * a.width * a.outputs
    before = a.tile + thread * GROUP_BYTES
    x_tiles, g_tiles = a.input_tiles + thread * TILE_PAIRS * x_bytes, a.gradient_tiles + thread * TILE_PAIRS * g_bytes
    bias_sums = a.bias_sums + thread * group_count(a.outputs) * GROUP * WORD
    for pair in range(count):
        n, i, j = corner(2 * (first + pair), a.height, a.width)
        m, k, q = corner(2 * (first + pair) + 1, a.height, a.width)
        second_height = a.height if m < a.images else 0  # with an odd number of tiles, the last pair has one tile
        for c in range(0, a.inputs, GROUP):
            left = a.inputs - c
            transform_inputs(
                a.x + n * x_image + 2 * c, a.height, a.width, a.inputs, left, i - 1, j - 1, a.zeros, before
            )  # fmt: skip
            transform_second_inputs(
                a.x + m * x_image + 2 * c, second_height, a.width, a.inputs, left, k - 1, q - 1, a.zeros, before,
                x_tiles + pair * x_bytes + 2 * c // GROUP * GROUP_BYTES,
            )  # fmt: skip
        for c in range(0, a.outputs, GROUP):
            left, bias = a.outputs - c, bias_sums + WORD * c
            transform_gradients(
                a.gradient + n * g_image + 2 * c, a.height, a.width, a.outputs, left, i, j, a.zeros, bias, before
            )  # fmt: skip
            transform_second_gradients(
                a.gradient + m * g_image + 2 * c, second_height, a.width, a.outputs, left, k, q, a.zeros, bias, before,
                g_tiles + pair * g_bytes + 2 * c // GROUP * GROUP_BYTES,
            )  # fmt: skip


@njit(inline="always")
def _accumulate_pairs(a, first, count, thread):
    """Add the products of ``count`` pairs to this thread's sums, and prefetch the next tiles."""
    rows, columns = group_count(a.inputs) * GROUP, group_count(a.outputs) * GROUP
    x_bytes, g_bytes = _pair_bytes(a.inputs), _pair_bytes(a.outputs)
    x_tiles, g_tiles = a.input_tiles + thread * TILE_PAIRS * x_bytes, a.gradient_tiles + thread * TILE_PAIRS * g_bytes
    sums = a.weight_sums + thread * POINTS * rows * columns * WORD
    for point in range(POINTS):
        for tile in range(2 * count * point // POINTS, 2 * count * (point + 1) // POINTS):
            n, i, j = corner(2 * (first + TILE_PAIRS) + tile, a.height, a.width)
            if n < a.images:
                image = n * 2 * a.height * a.width
                prefetch_tile(a.x + image * a.inputs, i + 1, j + 1, a.height, a.width, a.inputs)
                prefetch_tile(a.gradient + image * a.outputs, i, j, a.height, a.width, a.outputs)
        for k in range(0, columns, GROUP):
            for c in range(0, rows, GRADIENT_ROWS):
                accumulate(
                    x_tiles + 2 * (c // GROUP) * GROUP_BYTES + point * PRODUCTS + c % GROUP * WORD, x_bytes,
                    g_tiles + 2 * (k // GROUP) * GROUP_BYTES + point * PRODUCTS, g_bytes,
                    count, sums + ((point * rows + c) * columns + k) * WORD, columns * WORD,
                )  # fmt: skip


@njit(inline="always")
def _write_weights(a, weight_sums, threads):
    """Sum over threads and transform to the gradient of the weight."""
    rows, columns = group_count(a.inputs) * GROUP, group_count(a.outputs) * GROUP
    weights = carray(pointer(a.weight), (a.outputs, 3, 3, a.inputs), np.float32)
    grid, half = np.empty((POINTS, columns), np.float32), np.empty((3, 4, columns), np.float32)
    begin, end = share(rows)
    for row in range(begin, end):
        c = channel_at(row)
        for point in range(POINTS):
            grid[point] = weight_sums[0, point, row]
            for other in range(1, threads):
                grid[point] += weight_sums[other, point, row]
        for j in range(4):
            for k in range(columns):
                middle = HALF * (grid[4 + j, k] + grid[8 + j, k])
                half[0, j, k], half[2, j, k] = grid[j, k] + middle, middle - grid[12 + j, k]
                half[1, j, k] = HALF * (grid[4 + j, k] - grid[8 + j, k])
        for i in range(3):
            for column in range(columns):
                k = channel_at(column)
                if c < a.inputs and k < a.outputs:
                    middle = HALF * (half[i, 1, column] + half[i, 2, column])
                    first, last = half[i, 0, column] + middle, middle - half[i, 3, column]
                    weights[k, i, 0, c], weights[k, i, 2, c] = first, last
                    weights[k, i, 1, c] = HALF * (half[i, 1, column] - half[i, 2, column])


@njit(inline="always")
def _write_biases(a, bias_sums, threads):
    """Sum over threads to the gradient of the bias."""
    biases = carray(pointer(a.bias), a.outputs, np.float32)
    begin, end = share(group_count(a.outputs) * GROUP)
    for column in range(begin, end):
        k = channel_at(column)
        if k < a.outputs:
            biases[k] = np.float32(0)
            for other in range(threads):
                biases[k] += bias_sums[other, column]
