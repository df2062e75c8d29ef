"""Layers for CPU ranks that pass over memory less often than PyTorch's: see :mod:`cifar_exp.kernels`."""

from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_exp import kernels
from cifar_exp.batch_norm import ReplacedBatchNorm

FUNCTIONS = {kernels.IDENTITY: lambda values: values, kernels.RELU: F.relu, kernels.GELU: F.gelu}


def fused(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` with other layers in place of some of its own; parameters and buffers stay the same ones.

    - ``nn.BatchNorm2d``, together with the ReLU or exact GELU behind it in an ``nn.Sequential``, which leaves an
      ``nn.Identity`` so that the layers after it keep their names;
    - ``nn.MaxPool2d`` over 2x2 windows.

    Their kernels are compiled here rather than in the first step.

    Args:
        model: on the CPU, channels-last.
        dtype: of its activations; where that is neither float32 nor bfloat16 all layers stay.

    Raises:
        Exception: what numba raises where it cannot compile a kernel; ``model`` can be used all the same.
    """
    if dtype not in kernels.ELEMENTS:
        return model
    layers = list(model._modules.items())  # named_children() leaves out what is there twice, and so what is between
    behind = layers[1:] if isinstance(model, nn.Sequential) else []
    for (name, layer), following in zip_longest(layers, behind):
        if type(layer) is nn.BatchNorm2d:
            activation = _activation(following[1]) if following else kernels.IDENTITY
            _compile(dtype, activation, kernels.batch_norm, kernels.batch_norm_gradient, kernels.normalized)
            setattr(model, name, FusedBatchNorm.with_activation(layer, activation))
            if activation != kernels.IDENTITY:
                setattr(model, following[0], nn.Identity())
        elif type(layer) is nn.MaxPool2d and _halves(layer):
            _compile(dtype, kernels.IDENTITY, kernels.pooled, kernels.unpooled)
            setattr(model, name, HalvingMaxPool())
        elif layer is not None:
            fused(layer, dtype)
    return model


def _compile(dtype: torch.dtype, activation: int, *functions: kernels.Kernel) -> None:
    for kernel in functions:
        kernels.address(kernel, dtype, activation)


def _activation(layer: nn.Module | None) -> int:
    """That of a layer which is nothing else."""
    if type(layer) is nn.ReLU:
        return kernels.RELU
    return kernels.GELU if type(layer) is nn.GELU and layer.approximate == "none" else kernels.IDENTITY


def _halves(layer: nn.MaxPool2d) -> bool:
    settings = [layer.kernel_size, layer.stride, layer.padding, layer.dilation]
    pairs = [value if isinstance(value, tuple) else (value, value) for value in settings]
    return pairs == [(2, 2), (2, 2), (0, 0), (1, 1)] and not (layer.ceil_mode or layer.return_indices)


def _fits(inputs: Tensor) -> bool:
    """Whether there are kernels for it."""
    return (
        inputs.device.type == "cpu"
        and inputs.dtype in kernels.ELEMENTS
        and inputs.dim() == 4
        and inputs.is_contiguous(memory_format=torch.channels_last)
    )


class FusedBatchNorm(ReplacedBatchNorm):
    """``nn.BatchNorm2d`` and an activation of what it returns."""

    activation = kernels.IDENTITY

    @classmethod
    def with_activation(cls, layer: _BatchNorm, activation: int) -> "FusedBatchNorm":
        """``layer``, its parameters and buffers shared with it, and what follows it."""
        made = cls.of(layer)
        made.activation = activation
        return made

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs``: (N, C, H, W) -> the same shape and type."""
        by_batch = self.training or self.running_mean is None
        own = (self.weight, self.bias, self.running_mean, self.running_var)
        fits = _fits(inputs) and all(value is None or value.dtype == torch.float32 for value in own)
        # PyTorch refuses batches of one value; and there is no kernel for the gradient where nothing is learned.
        if not fits or (_shape(inputs)[0] < 2 if by_batch else torch.is_grad_enabled() and inputs.requires_grad):
            outputs: Tensor = FUNCTIONS[self.activation](super().forward(inputs))
            return outputs
        weight = torch.ones(inputs.shape[1]) if self.weight is None else self.weight
        bias = torch.zeros(inputs.shape[1]) if self.bias is None else self.bias
        if by_batch:
            settings = (*self._tracked(), self.eps, self.activation)
            normalized: Tensor = _NormalizedByBatch.apply(inputs, weight, bias, *settings)
            return normalized
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = weight * (self.running_var.double() + self.eps).rsqrt()
        affine = torch.stack([scale, bias - self.running_mean * scale])
        outputs = torch.empty_like(inputs)
        kernels.launch(kernels.normalized, _shape(inputs), inputs, affine, outputs, activation=self.activation)
        return outputs

    def _tracked(self) -> tuple[Tensor, Tensor, float]:
        """The running statistics, or room for some, and how much of a batch's they take over."""
        if self.running_mean is None or self.running_var is None:
            return torch.zeros(self.num_features), torch.zeros(self.num_features), 0.0
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
        kernels.launch(kernels.batch_norm, (rows, columns), *arrays, numbers=(eps, momentum), activation=activation)
        context.save_for_backward(inputs, statistics)
        context.activation = activation
        return outputs

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        inputs, statistics = context.saved_tensors
        rows, columns = _shape(inputs)
        outputs, parameters = torch.empty_like(inputs), torch.empty((2, columns))
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        arrays = (gradient, inputs, statistics, outputs, parameters, _room(columns))
        kernels.launch(kernels.batch_norm_gradient, (rows, columns), *arrays, activation=context.activation)
        return outputs, *parameters, None, None, None, None, None


def _room(columns: int) -> Tensor:
    """For a kernel's sums."""
    return torch.empty((kernels.CHUNKS, 2, columns), dtype=torch.float64)


class HalvingMaxPool(nn.MaxPool2d):
    """Maxima of 2x2 windows that do not overlap."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H // 2, W // 2)."""
        outputs: Tensor = _Pooled.apply(input) if _fits(input) else super().forward(input)
        return outputs


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, inputs: Tensor) -> Tensor:
        images, columns, height, width = inputs.shape
        outputs = _empty((images, columns, height // 2, width // 2), inputs.dtype)
        places = torch.empty(outputs.numel(), dtype=torch.uint8)
        kernels.launch(kernels.pooled, (images, height, width, columns), inputs, outputs, places)
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
        kernels.launch(kernels.unpooled, (images, height, width, columns), gradient, places, outputs)
        return outputs


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
