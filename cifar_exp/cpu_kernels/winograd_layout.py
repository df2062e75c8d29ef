"""The memory layout of channels and tiles in the workspaces of Winograd's kernels.

Channels come in groups of 32. In a group, the even channels come before the odd ones: a vector of bfloat16 becomes two
vectors of float32, and back, without moving lanes.
"""

from numba import njit

from cifar_exp.cpu_kernels.llvm_vectors import LANES
from cifar_exp.cpu_kernels.winograd_tiles import GROUP


@njit(inline="always")
def group_count(channels):
    """The number of groups for ``channels`` channels. The last group may be partly empty."""
    return (channels + GROUP - 1) // GROUP


@njit(inline="always")
def channel_at(place):
    """The channel at a place in the layout."""
    within = place % GROUP
    return place - within + (2 * within if within < LANES else 2 * (within - LANES) + 1)


@njit(inline="always")
def tile_count(images, height, width):
    """The number of tiles of 2x2 outputs. For odd sides the last tile extends beyond the edge."""
    return images * ((height + 1) // 2) * ((width + 1) // 2)


@njit(inline="always")
def corner(tile, height, width):
    """Image, first row and first column of a tile's outputs."""
    down, across = (height + 1) // 2, (width + 1) // 2
    return tile // (down * across), 2 * (tile // across % down), 2 * (tile % across)
