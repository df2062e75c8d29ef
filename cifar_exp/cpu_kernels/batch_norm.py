"""CPU kernels for batch norm with an activation, forward and backward.

PyTorch's batch norm, ReLU and their gradients read or write a layer's activations fourteen times a step. These kernels
do it eight times.

Activations are matrices with a row per pixel and a column per channel, the memory layout of channels-last tensors. Sums
over rows end up in float64. They are sums over a fixed number of chunks, so no result depends on the number of threads.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit

from cifar_exp.cpu_kernels.activations import ZERO, activated, gradient_before
from cifar_exp.cpu_kernels.numba_runtime import (
    arguments,
    narrowed,
    pointer,
    share,
    thread_number,
    wait_for_threads,
    widened,
)

CHUNKS = 64  # of rows, each with its own sums
BLOCK = 256  # rows summed in float32 before adding to float64


class ForwardArguments(NamedTuple):
    """What :func:`batch_norm` takes: numbers, then addresses of arrays.

    Attributes:
        rows: pixels.
        columns: channels.
        eps: float64, as bits.
        momentum: float64, as bits: the weight of this batch in the running statistics.
        x: (rows, columns), the input.
        weight: (columns,) float32.
        bias: (columns,) float32.
        running_mean: (columns,) float32, updated in place.
        running_variance: (columns,) float32, updated in place.
        y: (rows, columns), gets the output.
        statistics: (4, columns) float64, gets mean, 1 / deviation, scale and shift. Normalized: x * scale + shift.
        sums: (CHUNKS, 2, columns) float64, workspace.
    """

    rows: int
    columns: int
    eps: int
    momentum: int
    x: int
    weight: int
    bias: int
    running_mean: int
    running_variance: int
    y: int
    statistics: int
    sums: int


class GradientArguments(NamedTuple):
    """What :func:`batch_norm_gradient` takes: numbers, then addresses of arrays.

    Attributes:
        rows: pixels.
        columns: channels.
        gradient: (rows, columns), the gradient of the output of :func:`batch_norm`.
        x: (rows, columns), its input.
        statistics: (4, columns) float64, as it wrote them.
        out: (rows, columns), gets the gradient of ``x``.
        parameters: (2, columns) float32, gets the gradients of weight and bias.
        sums: (CHUNKS, 2, columns) float64, workspace.
    """

    rows: int
    columns: int
    gradient: int
    x: int
    statistics: int
    out: int
    parameters: int
    sums: int


class AffineArguments(NamedTuple):
    """What :func:`affine` takes: numbers, then addresses of arrays.

    Attributes:
        rows: pixels.
        columns: channels.
        x: (rows, columns), the input.
        scale_and_shift: (2, columns) float64.
        y: (rows, columns), gets the output.
    """

    rows: int
    columns: int
    x: int
    scale_and_shift: int
    y: int


_forward_arguments = arguments(ForwardArguments)
_gradient_arguments = arguments(GradientArguments)
_affine_arguments = arguments(AffineArguments)


def batch_norm(element: Any, activation: int) -> Any:
    """Batch norm in training and an activation. See :class:`ForwardArguments`."""

    def kernel(packed):
        a = _forward_arguments(packed)
        rows, columns = a.rows, a.columns
        eps, momentum = np.int64(a.eps).view(np.float64), np.int64(a.momentum).view(np.float64)
        x = carray(pointer(a.x), (rows, columns), element)
        weight, bias = carray(pointer(a.weight), columns, np.float32), carray(pointer(a.bias), columns, np.float32)
        running_mean = carray(pointer(a.running_mean), columns, np.float32)
        running_variance = carray(pointer(a.running_variance), columns, np.float32)
        y = carray(pointer(a.y), (rows, columns), element)
        statistics = carray(pointer(a.statistics), (4, columns), np.float64)
        sums = carray(pointer(a.sums), (CHUNKS, 2, columns), np.float64)
        origin = _rough_mean(x, rows, columns)
        _sum_values(x, rows, columns, origin, sums)
        wait_for_threads()
        scale, shift = np.empty(columns, np.float32), np.empty(columns, np.float32)
        for c in range(columns):
            moment, square = _total(sums, 0, c) / rows, _total(sums, 1, c) / rows
            mean, variance = origin[c] + moment, max(square - moment * moment, 0.0)
            inverse = 1 / np.sqrt(variance + eps)
            exact_scale = weight[c] * inverse
            exact_shift = bias[c] - mean * exact_scale
            scale[c], shift[c] = exact_scale, exact_shift
            if thread_number() == 0:
                statistics[0, c], statistics[1, c] = mean, inverse
                statistics[2, c], statistics[3, c] = exact_scale, exact_shift
                running_mean[c] += momentum * (mean - running_mean[c])
                running_variance[c] += momentum * (variance * rows / (rows - 1) - running_variance[c])
        begin, end = share(rows)
        for back in range(end - begin):
            i = end - 1 - back  # backwards: the last rows are still in the cache
            for c in range(columns):
                y[i, c] = narrowed(activated(widened(x[i, c]) * scale[c] + shift[c], activation), y)

    return kernel


@njit(inline="always")
def _rough_mean(x, rows, columns):
    """(columns,) float32: the mean of a few rows. Squares are summed around it, to avoid cancellation."""
    origin = np.zeros(columns, np.float32)
    few = min(rows, CHUNKS)
    for row in range(few):
        for c in range(columns):
            origin[c] += widened(x[row * rows // few, c]) / np.float32(few)
    return origin


@njit(inline="always")
def _sum_values(x, rows, columns, origin, sums):
    """Sums over the rows of each chunk: of x - origin, and of its square."""
    first, second = np.zeros(columns, np.float32), np.zeros(columns, np.float32)
    begin, end = share(CHUNKS)
    for chunk in range(begin, end):
        sums[chunk] = 0
        row, last = rows * chunk // CHUNKS, rows * (chunk + 1) // CHUNKS
        while row < last:
            stop = min(row + BLOCK, last)
            for i in range(row, stop - 3, 4):
                for c in range(columns):
                    x0, x1 = widened(x[i, c]) - origin[c], widened(x[i + 1, c]) - origin[c]
                    x2, x3 = widened(x[i + 2, c]) - origin[c], widened(x[i + 3, c]) - origin[c]
                    first[c] += (x0 + x1) + (x2 + x3)
                    second[c] += (x0 * x0 + x1 * x1) + (x2 * x2 + x3 * x3)
            for i in range(row + (stop - row) // 4 * 4, stop):
                for c in range(columns):
                    value = widened(x[i, c]) - origin[c]
                    first[c] += value
                    second[c] += value * value
            _move(first, second, sums[chunk])
            row = stop


def batch_norm_gradient(element: Any, activation: int) -> Any:
    """The gradients of :func:`batch_norm`. See :class:`GradientArguments`."""

    def kernel(packed):
        a = _gradient_arguments(packed)
        rows, columns = a.rows, a.columns
        g = carray(pointer(a.gradient), (rows, columns), element)
        x = carray(pointer(a.x), (rows, columns), element)
        statistics = carray(pointer(a.statistics), (4, columns), np.float64)
        out = carray(pointer(a.out), (rows, columns), element)
        parameters = carray(pointer(a.parameters), (2, columns), np.float32)
        sums = carray(pointer(a.sums), (CHUNKS, 2, columns), np.float64)
        scale, shift = statistics[2].astype(np.float32), statistics[3].astype(np.float32)
        _sum_gradients(g, x, rows, columns, statistics[0].astype(np.float32), scale, shift, sums, activation)
        wait_for_threads()
        offset, slope = np.empty(columns, np.float32), np.empty(columns, np.float32)
        for c in range(columns):
            total, product = _total(sums, 0, c), _total(sums, 1, c)
            exact_mean, inverse, exact_scale = statistics[0, c], statistics[1, c], statistics[2, c]
            exact_slope = exact_scale * inverse * inverse * product / rows
            slope[c], offset[c] = exact_slope, exact_scale * total / rows - exact_slope * exact_mean
            if thread_number() == 0:
                parameters[0, c], parameters[1, c] = product * inverse, total
        begin, end = share(rows)
        for back in range(end - begin):
            i = end - 1 - back
            for c in range(columns):
                value = widened(x[i, c])
                gradient = gradient_before(widened(g[i, c]), value * scale[c] + shift[c], activation)
                out[i, c] = narrowed(scale[c] * gradient - offset[c] - slope[c] * value, out)

    return kernel


@njit(inline="always")
def _sum_gradients(g, x, rows, columns, mean, scale, shift, sums, activation):
    """Sums over the rows of each chunk: of the gradient before the activation, and of it times x - mean."""
    first, second = np.zeros(columns, np.float32), np.zeros(columns, np.float32)
    begin, end = share(CHUNKS)
    for chunk in range(begin, end):
        sums[chunk] = 0
        row, last = rows * chunk // CHUNKS, rows * (chunk + 1) // CHUNKS
        while row < last:
            stop = min(row + BLOCK, last)
            for i in range(row, stop - 3, 4):
                for c in range(columns):
                    x0, x1 = widened(x[i, c]), widened(x[i + 1, c])
                    x2, x3 = widened(x[i + 2, c]), widened(x[i + 3, c])
                    g0 = gradient_before(widened(g[i, c]), x0 * scale[c] + shift[c], activation)
                    g1 = gradient_before(widened(g[i + 1, c]), x1 * scale[c] + shift[c], activation)
                    g2 = gradient_before(widened(g[i + 2, c]), x2 * scale[c] + shift[c], activation)
                    g3 = gradient_before(widened(g[i + 3, c]), x3 * scale[c] + shift[c], activation)
                    first[c] += (g0 + g1) + (g2 + g3)
                    second[c] += (g0 * (x0 - mean[c]) + g1 * (x1 - mean[c])) + (
                        g2 * (x2 - mean[c]) + g3 * (x3 - mean[c])
                    )
            for i in range(row + (stop - row) // 4 * 4, stop):
                for c in range(columns):
                    value = widened(x[i, c])
                    gradient = gradient_before(widened(g[i, c]), value * scale[c] + shift[c], activation)
                    first[c] += gradient
                    second[c] += gradient * (value - mean[c])
            _move(first, second, sums[chunk])
            row = stop


@njit(inline="always")
def _move(first, second, sums):
    """Add two float32 rows to two float64 rows of ``sums``, then set them to zero."""
    for c in range(len(first)):
        sums[0, c] += first[c]
        sums[1, c] += second[c]
        first[c] = second[c] = ZERO


@njit(inline="always")
def _total(sums, which, column):
    """The sum over all chunks, in a fixed order."""
    total = 0.0
    for chunk in range(CHUNKS):
        total += sums[chunk, which, column]
    return total


def affine(element: Any, activation: int) -> Any:
    """The activation of x * scale + shift: batch norm in evaluation. See :class:`AffineArguments`."""

    def kernel(packed):
        a = _affine_arguments(packed)
        rows, columns = a.rows, a.columns
        x = carray(pointer(a.x), (rows, columns), element)
        scale_and_shift = carray(pointer(a.scale_and_shift), (2, columns), np.float64)
        y = carray(pointer(a.y), (rows, columns), element)
        scale, shift = scale_and_shift[0].astype(np.float32), scale_and_shift[1].astype(np.float32)
        begin, end = share(rows)
        for i in range(begin, end):
            for c in range(columns):
                y[i, c] = narrowed(activated(widened(x[i, c]) * scale[c] + shift[c], activation), y)

    return kernel
