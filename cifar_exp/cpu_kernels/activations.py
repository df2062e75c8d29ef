"""Activations and their derivatives inside kernels."""

import numpy as np
from numba import njit

IDENTITY, RELU, GELU = 0, 1, 2
# All constants are float32, or numba would compute in float64.
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
ROOT_HALF, DENSITY_AT_ZERO = np.float32(2**-0.5), np.float32((2 * np.pi) ** -0.5)
LOG2_E, LN_2 = np.float32(np.log2(np.e)), np.float32(np.log(2))
E2, E3, E4, E5, E6 = (np.float32(1 / factorial) for factorial in (2, 6, 24, 120, 720))
LEAST_EXPONENT = np.float32(-87)  # below this, exp is subnormal
TO_INTEGER = np.float32(1.5 * 2**23)  # after adding this, the lowest bits are the rounded integer
P, A1, A2 = np.float32(0.3275911), np.float32(0.254829592), np.float32(-0.284496736)
A3, A4, A5 = np.float32(1.421413741), np.float32(-1.453152027), np.float32(1.061405429)


@njit(inline="always")
def gaussian(value):
    """Distribution function and density of the standard normal distribution.

    The error function is 7.1.26 of Abramowitz and Stegun 1964, absolute error 1.5e-7. The exponential is a power
    series.
    """
    size = abs(value) * ROOT_HALF
    exponent = -size * size
    exponent = exponent if exponent > LEAST_EXPONENT else LEAST_EXPONENT
    shifted = exponent * LOG2_E + TO_INTEGER
    rest = exponent - (shifted - TO_INTEGER) * LN_2
    series = ONE + rest * (ONE + rest * (E2 + rest * (E3 + rest * (E4 + rest * (E5 + rest * E6)))))
    # A power of two, as the bits of its exponent.
    power = np.uint32(np.float32(shifted).view(np.uint32) + np.uint32(127))
    exponential = series * np.uint32(power << np.uint32(23)).view(np.float32)
    t = ONE / (ONE + P * size)
    tail = HALF * exponential * t * (A1 + t * (A2 + t * (A3 + t * (A4 + t * A5))))
    return (tail if value < ZERO else ONE - tail), exponential * DENSITY_AT_ZERO


@njit(inline="always")
def activated(value, activation):
    """The activation of a float32."""
    if activation == RELU:
        return ZERO if value < ZERO else value
    if activation == GELU:
        return value * gaussian(value)[0]
    return value


@njit(inline="always")
def gradient_before(gradient, value, activation):
    """The gradient before the activation, from the ``gradient`` after it and the ``value`` before it."""
    if activation == RELU:
        return gradient if value > ZERO else ZERO
    if activation == GELU:
        distribution, density = gaussian(value)
        return gradient * (distribution + value * density)
    return gradient
