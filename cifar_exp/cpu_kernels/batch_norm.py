"""What a network does between its convolutions, in fewer passes over memory, for CPU ranks.

PyTorch's batch norm, ReLU and their gradients read or write a layer's activations fourteen times a step. These kernels
do it eight times, and pooling without 64-bit indices: see :mod:`cifar_exp.cpu_kernels.numba_runtime`.

Activations are matrices of a row for each pixel and a column for each channel, as channels-last tensors are in memory.
What is summed over rows ends up in float64. Sums are over chunks whose number is fixed, so that no result depends on
the number of threads.
"""

from typing import Any

import numpy as np
from numba import carray, njit

from cifar_exp.cpu_kernels.numba_runtime import narrowed, pointer, share, thread_number, wait_for_threads, widened

IDENTITY, RELU, GELU = 0, 1, 2
CHUNKS = 64  # of rows, each summed on its own
BLOCK = 256  # rows that are summed in float32
# Of one type, or numba would compute in float64.
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
ROOT_HALF, DENSITY_AT_ZERO = np.float32(2**-0.5), np.float32((2 * np.pi) ** -0.5)
LOG2_E, LN_2 = np.float32(np.log2(np.e)), np.float32(np.log(2))
E2, E3, E4, E5, E6 = (np.float32(1 / factorial) for factorial in (2, 6, 24, 120, 720))
LEAST_EXPONENT = np.float32(-87)  # of e, for a normal number
TO_INTEGER = np.float32(1.5 * 2**23)  # a number to which this is added has its integer part in the lowest bits
P, A1, A2 = np.float32(0.3275911), np.float32(0.254829592), np.float32(-0.284496736)
A3, A4, A5 = np.float32(1.421413741), np.float32(-1.453152027), np.float32(1.061405429)


@njit(inline="always")
def _gaussian(value):
    """Distribution and density of the standard normal distribution.

    The error function is 7.1.26 of Abramowitz and Stegun 1964, absolute error 1.5e-7; the exponential a power series.
    """
    size = abs(value) * ROOT_HALF
    exponent = -size * size
    exponent = exponent if exponent > LEAST_EXPONENT else LEAST_EXPONENT
    shifted = exponent * LOG2_E + TO_INTEGER
    rest = exponent - (shifted - TO_INTEGER) * LN_2
    series = ONE + rest * (ONE + rest * (E2 + rest * (E3 + rest * (E4 + rest * (E5 + rest * E6)))))
    power = np.uint32(np.float32(shifted).view(np.uint32) + np.uint32(127))  # of two, biased, in the lowest bits
    exponential = series * np.uint32(power << np.uint32(23)).view(np.float32)
    t = ONE / (ONE + P * size)
    tail = HALF * exponential * t * (A1 + t * (A2 + t * (A3 + t * (A4 + t * A5))))
    return (tail if value < ZERO else ONE - tail), exponential * DENSITY_AT_ZERO


@njit(inline="always")
def _activated(value, activation):
    if activation == RELU:
        return ZERO if value < ZERO else value
    if activation == GELU:
        return value * _gaussian(value)[0]
    return value


@njit(inline="always")
def _through(gradient, value, activation):
    """The gradient before the activation of ``value``, from the one after it."""
    if activation == RELU:
        return gradient if value > ZERO else ZERO
    if activation == GELU:
        distribution, density = _gaussian(value)
        return gradient * (distribution + value * density)
    return gradient


def batch_norm(element: Any, activation: int) -> Any:
    """Of (rows, columns); eps, momentum: ``x``, weight, bias, running mean and variance -> the activation of the
    normalised ``x``; ``statistics``.

    ``statistics`` are float64, a row each: the mean over rows, the reciprocal of the deviation, and the scale and shift
    of which x * scale + shift is normalised. ``sums``, (CHUNKS, 2, columns), is room for what comes between. The
    running statistics, float32, go towards the batch's by ``momentum``.
    """

    def kernel(p):
        rows, columns = p[0], p[1]
        eps, momentum = np.int64(p[2]).view(np.float64), np.int64(p[3]).view(np.float64)
        x = carray(pointer(p[4]), (rows, columns), element)
        weight, bias = carray(pointer(p[5]), columns, np.float32), carray(pointer(p[6]), columns, np.float32)
        running_mean = carray(pointer(p[7]), columns, np.float32)
        running_variance = carray(pointer(p[8]), columns, np.float32)
        y = carray(pointer(p[9]), (rows, columns), element)
        statistics = carray(pointer(p[10]), (4, columns), np.float64)
        sums = carray(pointer(p[11]), (CHUNKS, 2, columns), np.float64)
        # The mean of a few: squares of large numbers would leave nothing of their small differences.
        origin = np.zeros(columns, np.float32)
        few = min(rows, CHUNKS)
        for row in range(few):
            for c in range(columns):
                origin[c] += widened(x[row * rows // few, c]) / np.float32(few)
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
                _add_to(sums[chunk], first, second)
                row = stop
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
            i = end - 1 - back  # the end is still in the cache
            for c in range(columns):
                y[i, c] = narrowed(_activated(widened(x[i, c]) * scale[c] + shift[c], activation), y)

    return kernel


def batch_norm_gradient(element: Any, activation: int) -> Any:
    """Of (rows, columns): the gradient ``g`` of what ``batch_norm`` returns, its ``x`` and ``statistics`` -> that of
    ``x``, those of weight and bias as two rows of float32. ``sums`` is as there.
    """

    def kernel(p):
        rows, columns = p[0], p[1]
        g = carray(pointer(p[2]), (rows, columns), element)
        x = carray(pointer(p[3]), (rows, columns), element)
        statistics = carray(pointer(p[4]), (4, columns), np.float64)
        out = carray(pointer(p[5]), (rows, columns), element)
        parameters = carray(pointer(p[6]), (2, columns), np.float32)
        sums = carray(pointer(p[7]), (CHUNKS, 2, columns), np.float64)
        mean = statistics[0].astype(np.float32)
        scale, shift = statistics[2].astype(np.float32), statistics[3].astype(np.float32)
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
                        g0 = _through(widened(g[i, c]), x0 * scale[c] + shift[c], activation)
                        g1 = _through(widened(g[i + 1, c]), x1 * scale[c] + shift[c], activation)
                        g2 = _through(widened(g[i + 2, c]), x2 * scale[c] + shift[c], activation)
                        g3 = _through(widened(g[i + 3, c]), x3 * scale[c] + shift[c], activation)
                        first[c] += (g0 + g1) + (g2 + g3)
                        second[c] += (g0 * (x0 - mean[c]) + g1 * (x1 - mean[c])) + (
                            g2 * (x2 - mean[c]) + g3 * (x3 - mean[c])
                        )
                for i in range(row + (stop - row) // 4 * 4, stop):
                    for c in range(columns):
                        value = widened(x[i, c])
                        gradient = _through(widened(g[i, c]), value * scale[c] + shift[c], activation)
                        first[c] += gradient
                        second[c] += gradient * (value - mean[c])
                _add_to(sums[chunk], first, second)
                row = stop
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
                gradient = _through(widened(g[i, c]), value * scale[c] + shift[c], activation)
                out[i, c] = narrowed(scale[c] * gradient - offset[c] - slope[c] * value, out)

    return kernel


@njit(inline="always")
def _add_to(sums, first, second):
    """Move two rows of float32 to those of float64."""
    for c in range(len(first)):
        sums[0, c] += first[c]
        sums[1, c] += second[c]
        first[c] = second[c] = ZERO


@njit(inline="always")
def _total(sums, which, column):
    """Over all chunks, in their order."""
    total = 0.0
    for chunk in range(CHUNKS):
        total += sums[chunk, which, column]
    return total


def normalized(element: Any, activation: int) -> Any:
    """Of (rows, columns): ``x``, scale and shift as two rows of float64 -> the activation of x * scale + shift."""

    def kernel(p):
        rows, columns = p[0], p[1]
        x = carray(pointer(p[2]), (rows, columns), element)
        affine = carray(pointer(p[3]), (2, columns), np.float64)
        y = carray(pointer(p[4]), (rows, columns), element)
        scale, shift = affine[0].astype(np.float32), affine[1].astype(np.float32)
        begin, end = share(rows)
        for i in range(begin, end):
            for c in range(columns):
                y[i, c] = narrowed(_activated(widened(x[i, c]) * scale[c] + shift[c], activation), y)

    return kernel
