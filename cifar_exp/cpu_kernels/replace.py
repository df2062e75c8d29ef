"""Select the layers of a network that fused layers replace."""

from collections import Counter
from collections.abc import Collection, Iterator
from itertools import zip_longest

import torch
from torch import nn

from cifar_exp.cpu_kernels import (
    activations,
    batch_norm,
    max_pool,
    numba_runtime,
    winograd,
    winograd_convolution,
    winograd_weight_gradient,
)
from cifar_exp.cpu_kernels.layers import FusedActivation, FusedBatchNorm, HalvingMaxPool, WinogradConvolution


def fuse_layers(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace layers of ``model`` by fused ones. Parameters and buffers stay the same tensors.

    Layers that are replaced:

    - ``nn.BatchNorm2d``, with the ReLU or exact GELU after it in an ``nn.Sequential``. A ``FusedActivation``
      replaces the activation, so that later layers keep their names.
    - ``nn.MaxPool2d`` over 2x2 windows.
    - ``nn.Conv2d`` with 3x3 kernels, stride 1 and padding 1, in bfloat16, on processors that multiply bfloat16
      with AVX512 and have no AMX.

    Layers that are used twice or have hooks are kept. Kernels are compiled here, before the first step.

    Args:
        model: on the CPU, channels-last.
        dtype: the dtype of its activations. Unless it is float32 or bfloat16, all layers are kept.

    Raises:
        Exception: numba cannot compile a kernel; ``model`` is unchanged.
    """
    if dtype not in numba_runtime.ELEMENTS:
        return model
    places = Counter(layer for parent in model.modules() for layer in parent._modules.values() if layer is not None)
    single = {layer for layer, count in places.items() if count == 1}
    found = [replacement for parent in model.modules() for replacement in _replacements(parent, dtype, single)]
    for _, _, layer in found:
        used: tuple[numba_runtime.Kernel, ...] = ()
        if isinstance(layer, FusedBatchNorm):
            used = (batch_norm.batch_norm, batch_norm.batch_norm_gradient, batch_norm.affine)
        elif isinstance(layer, HalvingMaxPool):
            used = (max_pool.max_pool, max_pool.max_pool_gradient)
        elif isinstance(layer, WinogradConvolution):
            used = (winograd_convolution.convolution, winograd_weight_gradient.weight_gradient)
        for kernel in used:
            numba_runtime.compiled(kernel, dtype, getattr(layer, "activation", activations.IDENTITY))
    for parent, name, layer in found:
        setattr(parent, name, layer)
    return model


def _replacements(
    parent: nn.Module, dtype: torch.dtype, single: Collection[nn.Module]
) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Replacements: parent, name of the child, new layer. ``single``: layers that are used once in the network."""
    layers = {
        name: layer
        for name, layer in parent._modules.items()
        if layer is not None and layer in single and not _has_hooks(layer)
    }
    names = list(parent._modules)
    in_order = type(parent).forward is nn.Sequential.forward and "forward" not in vars(parent)
    for name, next_name in zip_longest(names, names[1:] if in_order else []):
        layer = layers.get(name)
        if type(layer) is nn.BatchNorm2d:
            activation = _activation(layers.get(next_name))
            fused = FusedBatchNorm.with_activation(layer, activation, dtype)
            yield parent, name, fused
            if activation != activations.IDENTITY:
                yield parent, next_name, FusedActivation(fused)
        elif type(layer) is nn.MaxPool2d and _halves(layer):
            yield parent, name, HalvingMaxPool(dtype)
        elif type(layer) is nn.Conv2d and dtype == torch.bfloat16 and winograd.pays() and _keeps_size(layer):
            yield parent, name, WinogradConvolution.of(layer)


def _has_hooks(layer: nn.Module) -> bool:
    """Whether a layer has hooks or its own ``forward``."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return "forward" in vars(layer) or any(getattr(layer, name, None) for name in hooks)


def _activation(layer: nn.Module | None) -> int:
    """The variant of the kernels for an activation layer; the identity's for any other layer."""
    if type(layer) is nn.ReLU:
        return activations.RELU
    return activations.GELU if type(layer) is nn.GELU and layer.approximate == "none" else activations.IDENTITY


def _halves(layer: nn.MaxPool2d) -> bool:
    settings = [layer.kernel_size, layer.stride, layer.padding, layer.dilation]
    pairs = [value if isinstance(value, tuple) else (value, value) for value in settings]
    return pairs == [(2, 2), (2, 2), (0, 0), (1, 1)] and not (layer.ceil_mode or layer.return_indices)


def _keeps_size(layer: nn.Conv2d) -> bool:
    """Whether a convolution has 3x3 kernels and keeps the size of images."""
    return (
        layer.kernel_size == (3, 3)
        and layer.padding in ("same", (1, 1))
        and layer.padding_mode == "zeros"
        and layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
    )
