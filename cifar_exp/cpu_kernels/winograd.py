"""3x3 convolutions by Winograd's method: when they pay, forward and gradients."""

import torch
from torch import Tensor

from cifar_exp.cpu_kernels import llvm_vectors
from cifar_exp.cpu_kernels.llvm_vectors import BYTES, LANES
from cifar_exp.cpu_kernels.numba_runtime import launch, target
from cifar_exp.cpu_kernels.winograd_kernels import TILE_PAIRS, convolved, derived
from cifar_exp.cpu_kernels.winograd_tiles import GROUP, GROUP_BYTES, POINTS, PRODUCTS, TILE_PRODUCTS, TILES, WORD

FEWEST_TILES = 256  # a thread; with fewer, transforming weights and adding up threads takes longer than is saved
LEAST_SAVED = 1.2  # products of a direct convolution for each one of these, where groups and tiles are partly empty


def pays() -> bool:
    """Whether there are the instructions, and none with which oneDNN's direct convolutions are faster still."""
    features = target()[2]
    return features.issuperset(llvm_vectors.NEEDED) and "amx-bf16" not in features


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
