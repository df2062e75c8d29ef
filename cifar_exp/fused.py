"""Layers for CPU ranks that compute less, or pass over memory less often, than PyTorch's.

See :mod:`cifar_exp.winograd` and :mod:`cifar_exp.kernels`.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from itertools import zip_longest
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_exp import kernels, native, winograd
from cifar_exp.batch_norm import ReplacedBatchNorm

FUNCTIONS = {kernels.IDENTITY: lambda values: values, kernels.RELU: F.relu, kernels.GELU: F.gelu}


def fused(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` with other layers in place of some of its own; parameters and buffers stay the same ones.

    - ``nn.BatchNorm2d``, together with the ReLU or exact GELU behind it in an ``nn.Sequential``, which leaves an
      ``nn.Identity`` so that the layers after it keep their names;
    - ``nn.MaxPool2d`` over 2x2 windows;
    - ``nn.Conv2d`` of 3x3 kernels that leaves images as large as they are, in bfloat16, on processors that multiply it
      in AVX512 and have no AMX.

    Layers that are in several places or have hooks stay. Kernels are compiled here rather than in the first step.

    Args:
        model: on the CPU, channels-last.
        dtype: of its activations; where that is neither float32 nor bfloat16 all layers stay.

    Raises:
        Exception: what numba raises where it cannot compile a kernel; ``model`` is as it was.
    """
    if dtype not in native.ELEMENTS:
        return model
    places = Counter(layer for parent in model.modules() for layer in parent._modules.values() if layer is not None)
    single = {layer for layer, count in places.items() if count == 1}
    found = [replacement for parent in model.modules() for replacement in _replacements(parent, dtype, single)]
    for _, _, layer in found:
        used: tuple[native.Kernel, ...] = ()
        if isinstance(layer, FusedBatchNorm):
            used = (kernels.batch_norm, kernels.batch_norm_gradient, kernels.normalized)
        elif isinstance(layer, HalvingMaxPool):
            used = (kernels.pooled, kernels.unpooled)
        elif isinstance(layer, WinogradConvolution):
            used = (winograd.convolved, winograd.derived)
        for kernel in used:
            native.compiled(kernel, dtype, getattr(layer, "activation", kernels.IDENTITY))
    for parent, name, layer in found:
        setattr(parent, name, layer)
    return model


def _replacements(
    parent: nn.Module, dtype: torch.dtype, single: Collection[nn.Module]
) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """What ``parent`` has to have under which names; ``single`` are layers that are in one place of the network."""
    layers = {
        name: layer
        for name, layer in parent._modules.items()
        if layer is not None and layer in single and not _has_hooks(layer)
    }
    names = list(parent._modules)
    in_order = type(parent).forward is nn.Sequential.forward and "forward" not in vars(parent)
    for name, behind in zip_longest(names, names[1:] if in_order else []):
        layer = layers.get(name)
        if type(layer) is nn.BatchNorm2d:
            activation = _activation(layers.get(behind))
            yield parent, name, FusedBatchNorm.with_activation(layer, activation, dtype)
            if activation != kernels.IDENTITY:
                yield parent, behind, nn.Identity()
        elif type(layer) is nn.MaxPool2d and _halves(layer):
            yield parent, name, HalvingMaxPool(dtype)
        elif type(layer) is nn.Conv2d and dtype == torch.bfloat16 and winograd.pays() and _keeps_size(layer):
            yield parent, name, WinogradConvolution.of(layer)


def _has_hooks(layer: nn.Module) -> bool:
    """Whether somebody relies on its being called."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return "forward" in vars(layer) or any(getattr(layer, name, None) for name in hooks)


def _activation(layer: nn.Module | None) -> int:
    """That of a layer which is nothing else."""
    if type(layer) is nn.ReLU:
        return kernels.RELU
    return kernels.GELU if type(layer) is nn.GELU and layer.approximate == "none" else kernels.IDENTITY


def _halves(layer: nn.MaxPool2d) -> bool:
    settings = [layer.kernel_size, layer.stride, layer.padding, layer.dilation]
    pairs = [value if isinstance(value, tuple) else (value, value) for value in settings]
    return pairs == [(2, 2), (2, 2), (0, 0), (1, 1)] and not (layer.ceil_mode or layer.return_indices)


def _keeps_size(layer: nn.Conv2d) -> bool:
    """Whether it is of 3x3 kernels and leaves images as large as they are."""
    return (
        layer.kernel_size == (3, 3)
        and layer.padding in ("same", (1, 1))
        and layer.padding_mode == "zeros"
        and layer.stride == layer.dilation == (1, 1)
        and layer.groups == 1
    )


def _fits(inputs: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels for ``dtype`` can take it."""
    return (
        inputs.device.type == "cpu"
        and inputs.dtype == dtype
        and inputs.dim() == 4
        and inputs.is_contiguous(memory_format=torch.channels_last)
    )


class FusedBatchNorm(ReplacedBatchNorm):
    """``nn.BatchNorm2d`` and an activation of what it returns."""

    activation = kernels.IDENTITY
    dtype = torch.float32  # of the inputs

    @classmethod
    def with_activation(cls, layer: _BatchNorm, activation: int, dtype: torch.dtype) -> "FusedBatchNorm":
        """``layer``, its parameters and buffers shared with it, and what follows it."""
        made = cls.of(layer)
        made.activation, made.dtype = activation, dtype
        return made

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs``: (N, C, H, W) -> the same shape and type."""
        by_batch = self.training or self.running_mean is None
        if not (self._fits(inputs) and (_shape(inputs)[0] > 1 if by_batch else not self._derived(inputs))):
            outputs: Tensor = FUNCTIONS[self.activation](super().forward(inputs))
            return outputs
        weight = torch.ones(self.num_features, dtype=torch.float32) if self.weight is None else self.weight
        bias = torch.zeros(self.num_features, dtype=torch.float32) if self.bias is None else self.bias
        if by_batch:
            settings = (*self._tracked(), self.eps, self.activation)
            normalized: Tensor = _NormalizedByBatch.apply(inputs, weight, bias, *settings)
            return normalized
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = weight * (self.running_var.double() + self.eps).rsqrt()
        affine = torch.stack([scale, bias - self.running_mean * scale])
        outputs = torch.empty_like(inputs)
        native.launch(kernels.normalized, _shape(inputs), inputs, affine, outputs, variant=self.activation)
        return outputs

    def _fits(self, inputs: Tensor) -> bool:
        own = (self.weight, self.bias, self.running_mean, self.running_var)
        return (
            _fits(inputs, self.dtype)
            and inputs.shape[1] == self.num_features
            and all(
                value is None
                or (value.dtype == torch.float32 and value.is_contiguous() and value.numel() == self.num_features)
                for value in own
            )
        )

    def _derived(self, inputs: Tensor) -> bool:
        """Whether gradients are wanted, for which there is a kernel in training alone."""
        values = (inputs, self.weight, self.bias)
        return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in values)

    def _tracked(self) -> tuple[Tensor, Tensor, float]:
        """The running statistics, or room for some, and how far they go towards the batch's."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            mean, variance = torch.zeros((2, self.num_features), dtype=torch.float32)
            return mean, variance, 0.0
        return self.running_mean, self.running_var, self.counted()


def _shape(values: Tensor) -> tuple[int, int]:
    """Rows and columns."""
    return values.numel() // values.shape[1], values.shape[1]


class _NormalizedByBatch(torch.autograd.Function):
    """Batch norm in training and an activation. The running statistics are changed in place."""

    @staticmethod
    def forward(
        context: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_variance: Tensor,
        momentum: float,
        eps: float,
        activation: int,
    ) -> Tensor:
        rows, columns = _shape(inputs)
        outputs, statistics = torch.empty_like(inputs), torch.empty((4, columns), dtype=torch.float64)
        arrays = (inputs, weight, bias, running_mean, running_variance, outputs, statistics, _room(columns))
        native.launch(kernels.batch_norm, (rows, columns), *arrays, numbers=(eps, momentum), variant=activation)
        context.save_for_backward(inputs, statistics)
        context.activation = activation
        return outputs

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, statistics = context.saved_tensors
        rows, columns = _shape(inputs)
        outputs, parameters = torch.empty_like(inputs), torch.empty((2, columns), dtype=torch.float32)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        arrays = (gradient, inputs, statistics, outputs, parameters, _room(columns))
        native.launch(kernels.batch_norm_gradient, (rows, columns), *arrays, variant=context.activation)
        return outputs, *parameters, None, None, None, None, None


def _room(columns: int) -> Tensor:
    """For a kernel's sums."""
    return torch.empty((kernels.CHUNKS, 2, columns), dtype=torch.float64)


class WinogradConvolution(nn.Conv2d):
    """A 3x3 convolution of stride 1 with a border of zeros, under autocast: inputs are bfloat16, the weight float32."""

    @classmethod
    def of(cls, layer: nn.Conv2d) -> Self:
        """``layer``, its parameters shared with it."""
        sizes = layer.in_channels, layer.out_channels
        # On no device, where initial values take no random numbers.
        made = cls(*sizes, 3, padding=1, bias=layer.bias is not None, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        return made.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, H, W)."""
        fits = (
            torch.is_autocast_enabled("cpu")  # else PyTorch takes no two types
            and torch.get_autocast_dtype("cpu") == torch.bfloat16
            and _fits(input, torch.bfloat16)
            and winograd.fits(input, self.weight)
            and (self.bias is None or self.bias.dtype == torch.float32)
        )
        if not fits:
            return super().forward(input)
        outputs: Tensor = _Convolved.apply(input, self.weight, self.bias)
        return outputs


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(inputs, weight)
        return winograd.convolve(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = context.saved_tensors
        of_inputs, of_weight, of_bias = context.needs_input_grad
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        before = winograd.convolve(gradient, weight, None, backward=True) if of_inputs else None
        weights, biases = winograd.gradients(inputs, gradient, weight) if of_weight or of_bias else (None, None)
        return before, weights if of_weight else None, biases if of_bias else None


class HalvingMaxPool(nn.MaxPool2d):
    """Maxima of 2x2 windows that do not overlap."""

    def __init__(self, dtype: torch.dtype) -> None:
        """``dtype``: of the inputs."""
        super().__init__(2)
        self.dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H // 2, W // 2)."""
        fits = _fits(input, self.dtype) and min(input.shape[2:]) > 1  # PyTorch refuses to leave nothing
        outputs: Tensor = _Pooled.apply(input) if fits else super().forward(input)
        return outputs


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, inputs: Tensor) -> Tensor:
        images, columns, height, width = inputs.shape
        outputs = _empty((images, columns, height // 2, width // 2), inputs.dtype)
        places = torch.empty(outputs.numel(), dtype=torch.uint8)
        native.launch(kernels.pooled, (images, height, width, columns), inputs, outputs, places)
        context.save_for_backward(places)
        context.shape = inputs.shape
        return outputs

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (places,) = context.saved_tensors
        images, columns, height, width = context.shape
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        outputs = _empty(context.shape, gradient.dtype)
        native.launch(kernels.unpooled, (images, height, width, columns), gradient, places, outputs)
        return outputs


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
