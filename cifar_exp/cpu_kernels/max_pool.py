"""2x2 max-pooling and its gradient as kernels for CPU ranks."""

from typing import Any

import numpy as np
from numba import carray, njit

from cifar_exp.cpu_kernels.numba_runtime import pointer, share, widened


def pooled(element: Any, _activation: int) -> Any:
    """Of (images, height, width, columns): ``x`` -> the maximum of each 2x2 window, and its place there, 0 to 3, the
    first one of equal ones.
    """

    def kernel(p):
        images, height, width, columns = p[0], p[1], p[2], p[3]
        half = width // 2
        lines = images * (height // 2)
        x = carray(pointer(p[4]), (images * height * width, columns), element)
        y = carray(pointer(p[5]), (lines * half, columns), element)
        places = carray(pointer(p[6]), (lines * half, columns), np.uint8)
        begin, end = share(lines)
        for line in range(begin, end):
            image, i = line // (height // 2), line % (height // 2)
            for j in range(half):
                out = line * half + j
                for below in range(2):  # a loop of few arrays each, which LLVM turns into vector instructions
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
    """The larger value, the first of equal ones, and its place. What is not a number wins."""
    wide = widened(value)
    wins = wide > widened(best) or wide != wide
    return (value if wins else best), (its_place if wins else place)


def unpooled(element: Any, _activation: int) -> Any:
    """Of (images, height, width, columns): the gradient of what ``pooled`` returns, the places -> that of ``x``."""

    def kernel(p):
        images, height, width, columns = p[0], p[1], p[2], p[3]
        half = width // 2
        lines = images * (height // 2)
        g = carray(pointer(p[4]), (lines * half, columns), element)
        places = carray(pointer(p[5]), (lines * half, columns), np.uint8)
        out = carray(pointer(p[6]), (images * height * width, columns), element)
        begin, end = share(lines)
        for line in range(begin, end):
            image, i = line // (height // 2), line % (height // 2)
            first = (image * height + 2 * i) * width
            for j in range(half):
                for place in range(4):  # a loop of few arrays each, which LLVM turns into vector instructions
                    target, this = first + place // 2 * width + 2 * j + place % 2, np.uint8(place)
                    for c in range(columns):
                        out[target, c] = g[line * half + j, c] if places[line * half + j, c] == this else element(0)
            # What no window covers, where a side is odd.
            if width % 2:
                out[first + width - 1] = out[first + 2 * width - 1] = element(0)
            if height % 2 and i == height // 2 - 1:
                out[first + 2 * width : first + 3 * width] = element(0)

    return kernel
