"""The kernel for Winograd's convolution and its gradient of inputs. ``winograd.py`` explains the method."""

from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit

from cifar_exp.cpu_kernels import llvm_vectors
from cifar_exp.cpu_kernels.llvm_vectors import BYTES, LANES
from cifar_exp.cpu_kernels.numba_runtime import (
    OPTIONS,
    arguments,
    narrowed,
    pointer,
    share,
    thread_number,
    wait_for_threads,
)
from cifar_exp.cpu_kernels.winograd_layout import channel_at, corner, group_count, tile_count
from cifar_exp.cpu_kernels.winograd_tiles import (
    FACTORS,
    GROUP,
    GROUP_BYTES,
    HALF,
    POINTS,
    PRODUCTS,
    TILE_PRODUCTS,
    TILES,
    WORD,
    multiply,
    prefetch_tile,
    transform_inputs,
    transform_products,
)


class ConvolutionArguments(NamedTuple):
    """What :func:`convolution` takes: numbers, then addresses of arrays. Images are bfloat16, channels-last.

    Attributes:
        images: how many.
        height: of an image.
        width: of an image.
        inputs: channels of ``x``.
        outputs: channels of ``y``.
        backward: 0 for a convolution; 1 for its gradient of inputs, with the gradient of outputs as ``x``.
        x: (images, height, width, inputs).
        weight: (outputs, 3, 3, inputs) float32; backward: (inputs, 3, 3, outputs).
        bias: (outputs rounded up to whole groups,) float32.
        y: (images, height, width, outputs), gets the result.
        zeros: a group of zeros, the padding.
        transformed: (16, outputs, inputs) bfloat16, workspace: transformed weights; backward: (16, inputs, outputs).
        factors: (groups of outputs, 16, half the inputs, 32 outputs) words, workspace: transformed weights in pairs.
        tiles: ``TILES`` transformed tiles per thread, workspace.
        products: ``TILES`` tiles of products per thread, workspace.
    """

    images: int
    height: int
    width: int
    inputs: int
    outputs: int
    backward: int
    x: int
    weight: int
    bias: int
    y: int
    zeros: int
    transformed: int
    factors: int
    tiles: int
    products: int


_arguments = arguments(ConvolutionArguments)


def convolution(_element: Any, _variant: int) -> Any:
    """A 3x3 convolution or its gradient of inputs. See :class:`ConvolutionArguments`."""

    def kernel(packed):
        a = _arguments(packed)
        llvm_vectors.align_stack()
        _prepare_factors(a)
        tile_bytes = group_count(a.inputs) * GROUP_BYTES + BYTES
        tiles = a.tiles + thread_number() * TILES * tile_bytes
        products = a.products + thread_number() * TILES * TILE_PRODUCTS
        begin, end = share(tile_count(a.images, a.height, a.width))
        for first in range(begin, end, TILES):
            count = min(TILES, end - first)
            _transform_tiles(a, first, count, tiles, tile_bytes)
            for block in range(group_count(a.outputs)):
                _multiply_tiles(a, first, count, block, tiles, tile_bytes, products)
                _write_outputs(a, first, count, block, products)

    return kernel


@njit(inline="always")
def _transform_tiles(a, first, count, tiles, tile_bytes):
    """Transform ``count`` tiles of inputs."""
    for tile in range(count):
        n, i, j = corner(first + tile, a.height, a.width)
        for c in range(0, a.inputs, GROUP):
            transform_inputs(
                a.x + n * 2 * a.height * a.width * a.inputs + 2 * c, a.height, a.width, a.inputs, a.inputs - c,
                i - 1, j - 1, a.zeros, tiles + tile * tile_bytes + c // GROUP * GROUP_BYTES,
            )  # fmt: skip


@njit(inline="always")
def _multiply_tiles(a, first, count, block, tiles, tile_bytes, products):
    """Multiply transformed tiles by the factors of one group of outputs, and prefetch the next tiles."""
    groups = group_count(a.inputs)
    for point in range(POINTS):
        if block == 0:
            for tile in range(count * point // POINTS, count * (point + 1) // POINTS):
                n, i, j = corner(first + TILES + tile, a.height, a.width)
                if n < a.images:
                    image = a.x + n * 2 * a.height * a.width * a.inputs
                    prefetch_tile(image, i + 1, j + 1, a.height, a.width, a.inputs)
        multiply(
            tiles + point * FACTORS, tile_bytes,
            a.factors + (block * POINTS + point) * groups * LANES * PRODUCTS, groups,
            products + point * PRODUCTS, TILE_PRODUCTS,
        )  # fmt: skip


@njit(inline="always")
def _write_outputs(a, first, count, block, products):
    """Transform products back to 2x2 outputs of one group of channels."""
    k = block * GROUP
    for tile in range(count):
        n, i, j = corner(first + tile, a.height, a.width)
        transform_products(
            products + tile * TILE_PRODUCTS, a.bias + WORD * k,
            a.y + 2 * (((n * a.height + i) * a.width + j) * a.outputs + k),
            a.width, a.outputs, a.height - i, a.width - j, a.outputs - k,
        )  # fmt: skip


@njit(inline="always")
def _prepare_factors(a):
    """Transform the weights and pack them in pairs of inputs, in layout order. Threads share the work."""
    groups, blocks = group_count(a.inputs), group_count(a.outputs)
    if a.backward:
        weight = carray(pointer(a.weight), (a.inputs, 3, 3, a.outputs), np.float32)
        transformed = carray(pointer(a.transformed), (POINTS, a.inputs, a.outputs), np.uint16)
    else:
        weight = carray(pointer(a.weight), (a.outputs, 3, 3, a.inputs), np.float32)
        transformed = carray(pointer(a.transformed), (POINTS, a.outputs, a.inputs), np.uint16)
    factors = carray(pointer(a.factors), (blocks, POINTS, groups * LANES, GROUP), np.uint32)
    _transform_weights(weight, transformed)
    wait_for_threads()
    begin, end = share(blocks * POINTS)
    for this in range(begin, end):
        block, point = this // POINTS, this % POINTS
        k, count = GROUP * block, min(GROUP, a.outputs - GROUP * block)
        for pair in range(groups * LANES):
            c, d = channel_at(2 * pair), channel_at(2 * pair + 1)
            for lane in range(count):
                low = high = np.uint16(0)
                if c < a.inputs:
                    low = transformed[_turned(point), c, k + lane] if a.backward else transformed[point, k + lane, c]
                if d < a.inputs:
                    high = transformed[_turned(point), d, k + lane] if a.backward else transformed[point, k + lane, d]
                factors[block, point, pair, lane] = np.uint32(low) | np.uint32(np.uint32(high) << np.uint32(16))
    wait_for_threads()


@njit(**OPTIONS)
def _transform_weights(weight, transformed):
    """(outputs, 3, 3, inputs) -> (16, outputs, inputs)."""
    outputs, inputs = weight.shape[0], weight.shape[3]
    half = np.empty((4, 3, inputs), np.float32)
    begin, end = share(outputs)
    for k in range(begin, end):
        for i in range(4):
            for j in range(3):
                for c in range(inputs):
                    half[i, j, c] = _row_of_g(i, weight[k, 0, j, c], weight[k, 1, j, c], weight[k, 2, j, c])
        for i in range(4):
            for j in range(4):
                for c in range(inputs):
                    value = _row_of_g(j, half[i, 0, c], half[i, 1, c], half[i, 2, c])
                    transformed[4 * i + j, k, c] = narrowed(value, transformed)


@njit(inline="always")
def _row_of_g(row, first, second, third):
    """A row of G times a column."""
    if row == 0:
        return first
    if row == 3:
        return third
    return HALF * (first + second + third) if row == 1 else HALF * (first - second + third)


@njit(inline="always")
def _turned(point):
    """The same point of the kernel rotated by 180 degrees, which the gradient of inputs needs."""
    i, j = point // 4, point % 4
    return 4 * (i if i % 3 else 3 - i) + (j if j % 3 else 3 - j)
