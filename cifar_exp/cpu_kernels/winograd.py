"""3x3 convolutions and their gradients with 16 products instead of 36, for CPU ranks that multiply bfloat16.

Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks",
arXiv:1509.09308) computes a tile of 2x2 outputs from 4x4 inputs. Inputs and weights are transformed to 16 numbers each,
and each pair is multiplied once. In one dimension, with * for the element-wise product:

    outputs = A' ((G weights) * (B' inputs)),    gradient of weights = G' sum over tiles of ((A gradient) * (B' inputs))

Sums over channels or tiles are 16 matrix products of bfloat16 numbers, summed in float32. Transformed numbers are
rounded to bfloat16, so inputs and gradients are rounded once more than in a direct convolution: errors are up to 2.6
times as large. A gradient of weights is float32, where PyTorch rounds it to bfloat16. It is summed over each thread's
tiles first, so its last digits depend on the number of threads.

Tiles are transformed in blocks that fit into a core's cache.
"""

import torch
from torch import Tensor

from cifar_exp.cpu_kernels import llvm_vectors
from cifar_exp.cpu_kernels.llvm_vectors import BYTES, LANES
from cifar_exp.cpu_kernels.numba_runtime import launch, target
from cifar_exp.cpu_kernels.winograd_convolution import convolution
from cifar_exp.cpu_kernels.winograd_tiles import GROUP, GROUP_BYTES, POINTS, PRODUCTS, TILE_PRODUCTS, TILES, WORD
from cifar_exp.cpu_kernels.winograd_weight_gradient import TILE_PAIRS, weight_gradient

FEWEST_TILES = 256  # per thread; with fewer, transforming weights and summing over threads costs more than it saves
LEAST_SAVED = 1.2  # minimum of direct products / products here, including the padding of groups and tiles


def runs() -> bool:
    """Whether the processor has the instructions that the kernels need."""
    return target()[2].issuperset(llvm_vectors.NEEDED)


def pays() -> bool:
    """Whether the kernels are faster than oneDNN's. With AMX, oneDNN's direct convolutions are faster."""
    return runs() and "amx-bf16" not in target()[2]


def fits(inputs: Tensor, weight: Tensor) -> bool:
    """Whether :func:`convolve` can take ``inputs`` and ``weight`` and is faster than a direct convolution.

    ``inputs``: (N, C, H, W) bfloat16, channels-last; ``weight``: any.
    """
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
    """A convolution of stride 1 and padding 1: (N, C, H, W) -> (N, K, H, W), bfloat16 and channels-last.

    Args:
        inputs: (N, C, H, W) bfloat16, channels-last.
        weight: (K, C, 3, 3) float32, channels-last.
        bias: (K,) float32.
        backward: take the gradient of outputs, (N, K, H, W), as ``inputs``, and return that of inputs.
    """
    images, channels, height, width = inputs.shape
    outputs = weight.shape[1 if backward else 0]
    groups, blocks, threads = -(-channels // GROUP), -(-outputs // GROUP), torch.get_num_threads()
    result = torch.empty((images, outputs, height, width), dtype=torch.bfloat16, memory_format=torch.channels_last)
    padded_bias = torch.zeros(blocks * GROUP, dtype=torch.float32)
    if bias is not None:
        padded_bias[:outputs] = bias
    workspace = (
        _zeros(),
        _bytes(POINTS * channels * outputs * 2),
        _bytes(blocks * POINTS * groups * LANES * PRODUCTS),
        _bytes(threads * TILES * (groups * GROUP_BYTES + BYTES)),
        _bytes(threads * TILES * TILE_PRODUCTS),
    )
    shape = (images, height, width, channels, outputs, int(backward))
    launch(convolution, shape, inputs, weight, padded_bias, result, *workspace)
    return result


def gradients(inputs: Tensor, gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of a convolution's weight and bias, float32.

    Args:
        inputs: (N, C, H, W) bfloat16, channels-last.
        gradient: (N, K, H, W) bfloat16, channels-last: the gradient of outputs.
        weight: (K, C, 3, 3) float32, channels-last.
    """
    images, channels, height, width = inputs.shape
    outputs = gradient.shape[1]
    groups, blocks, threads = -(-channels // GROUP), -(-outputs // GROUP), torch.get_num_threads()
    results = torch.empty_like(weight), torch.empty(outputs, dtype=torch.float32)
    workspace = (
        _zeros(),
        _bytes(threads * GROUP_BYTES),
        _bytes(threads * TILE_PAIRS * (2 * groups * GROUP_BYTES + BYTES)),
        _bytes(threads * TILE_PAIRS * (2 * blocks * GROUP_BYTES + BYTES)),
        _bytes(threads * POINTS * groups * blocks * GROUP**2 * WORD),
        _bytes(threads * blocks * GROUP * WORD),
    )
    launch(weight_gradient, (images, height, width, channels, outputs), inputs, gradient, *results, *workspace)
    return results


def _zeros() -> Tensor:
    """A group of channels outside of an image."""
    return torch.zeros(GROUP, dtype=torch.bfloat16)


def _bytes(size: int) -> Tensor:
    """Uninitialized memory."""
    return torch.empty(size, dtype=torch.uint8)
