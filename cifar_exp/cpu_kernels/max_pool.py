"""CPU kernels for 2x2 max-pooling and its gradient. An index is one byte; PyTorch's has eight."""

from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit

from cifar_exp.cpu_kernels.numba_runtime import arguments, pointer, share, widened


class PoolArguments(NamedTuple):
    """What :func:`max_pool` takes: numbers, then addresses of arrays.

    Attributes:
        images: how many.
        height: of an input image.
        width: of an input image.
        columns: channels.
        x: (images * height * width, columns), the input.
        y: (images * (height // 2) * (width // 2), columns), gets the maximum of each window.
        places: shaped as ``y``, uint8: gets the place of the maximum in its window, 0 to 3; the first of equal values.
    """

    images: int
    height: int
    width: int
    columns: int
    x: int
    y: int
    places: int


class PoolGradientArguments(NamedTuple):
    """What :func:`max_pool_gradient` takes: numbers, then addresses of arrays.

    Attributes:
        images: how many.
        height: of an input image.
        width: of an input image.
        columns: channels.
        gradient: shaped as ``y`` of :func:`max_pool`: the gradient of ``y``.
        places: those that :func:`max_pool` wrote.
        out: shaped as ``x`` of :func:`max_pool`: gets the gradient of ``x``.
    """

    images: int
    height: int
    width: int
    columns: int
    gradient: int
    places: int
    out: int


_pool_arguments = arguments(PoolArguments)
_gradient_arguments = arguments(PoolGradientArguments)


def max_pool(element: Any, _variant: int) -> Any:
    """The maximum of each 2x2 window. See :class:`PoolArguments`."""

    def kernel(packed):
        a = _pool_arguments(packed)
        images, height, width, columns = a.images, a.height, a.width, a.columns
        half = width // 2
        lines = images * (height // 2)
        x = carray(pointer(a.x), (images * height * width, columns), element)
        y = carray(pointer(a.y), (lines * half, columns), element)
        places = carray(pointer(a.places), (lines * half, columns), np.uint8)
        begin, end = share(lines)
        for line in range(begin, end):
            image, i = line // (height // 2), line % (height // 2)
            for j in range(half):
                out = line * half + j
                for below in range(2):  # LLVM vectorizes loops over few arrays
                    left = (image * height + 2 * i + below) * width + 2 * j
                    for c in range(columns):
                        best, place = x[left, c], np.uint8(2 * below)
                        best, place = _better(best, place, x[left + 1, c], np.uint8(2 * below + 1))
                        if below == 0:
                            y[out, c], places[out, c] = best, place
                        else:
                            y[out, c], places[out, c] = _better(y[out, c], places[out, c], best, place)

    return kernel


@njit(inline="always")
def _better(best, place, value, its_place):
    """The larger value and its place; the first of equal values. NaN counts as the largest."""
    wide = widened(value)
    wins = wide > widened(best) or wide != wide
    return (value if wins else best), (its_place if wins else place)


def max_pool_gradient(element: Any, _variant: int) -> Any:
    """The gradient of :func:`max_pool`. See :class:`PoolGradientArguments`."""

    def kernel(packed):
        a = _gradient_arguments(packed)
        images, height, width, columns = a.images, a.height, a.width, a.columns
        half = width // 2
        lines = images * (height // 2)
        g = carray(pointer(a.gradient), (lines * half, columns), element)
        places = carray(pointer(a.places), (lines * half, columns), np.uint8)
        out = carray(pointer(a.out), (images * height * width, columns), element)
        begin, end = share(lines)
        for line in range(begin, end):
            image, i = line // (height // 2), line % (height // 2)
            first = (image * height + 2 * i) * width
            for j in range(half):
                for place in range(4):  # LLVM vectorizes loops over few arrays
                    target, this = first + place // 2 * width + 2 * j + place % 2, np.uint8(place)
                    for c in range(columns):
                        out[target, c] = g[line * half + j, c] if places[line * half + j, c] == this else element(0)
            # No window covers the last column and row of an odd side.
            if width % 2:
                out[first + width - 1] = out[first + 2 * width - 1] = element(0)
            if height % 2 and i == height // 2 - 1:
                out[first + 2 * width : first + 3 * width] = element(0)

    return kernel
