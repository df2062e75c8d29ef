"""Layers for CPU ranks. They compute less than PyTorch's, or access memory less often.

See :mod:`cifar_exp.cpu_kernels.batch_norm`, :mod:`cifar_exp.cpu_kernels.max_pool` and
:mod:`cifar_exp.cpu_kernels.winograd`.
"""

import weakref
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_exp.cpu_kernels import activations, batch_norm, max_pool, numba_runtime, winograd
from cifar_exp.errors import ConfigError
from cifar_exp.models.replaced_batch_norm import ReplacedBatchNorm

# Forward passes whose outputs do not reach the activation: recomputing for the backward pass may end before it.
MOST_MISSED = 2
FUNCTIONS = {activations.IDENTITY: lambda values: values, activations.RELU: F.relu, activations.GELU: F.gelu}


def _fits(inputs: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``inputs`` have the layout and dtype that a kernel for ``dtype`` needs."""
    return (
        inputs.device.type == "cpu"
        and inputs.dtype == dtype
        and inputs.dim() == 4
        and inputs.is_contiguous(memory_format=torch.channels_last)
    )


class FusedBatchNorm(ReplacedBatchNorm):
    """``nn.BatchNorm2d`` and the activation after it, in one pass."""

    activation = activations.IDENTITY
    dtype = torch.float32  # of the inputs
    latest: "weakref.ref[Tensor] | None" = None  # the outputs that have not reached the place of the activation yet
    missed = 0  # forward passes since outputs last reached that place

    @classmethod
    def with_activation(cls, layer: _BatchNorm, activation: int, dtype: torch.dtype) -> "FusedBatchNorm":
        """The fused layer for ``layer`` and the activation after it. They share parameters and buffers."""
        made = cls.of(layer)
        made.activation, made.dtype = activation, dtype
        return made

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs``: (N, C, H, W) -> the same shape and dtype.

        Raises:
            ConfigError: the network does not pass the outputs to the activation that is fused.
        """
        outputs = self._normalized(inputs)
        if self.activation != activations.IDENTITY:
            self.latest, self.missed = weakref.ref(outputs), self.missed + 1
            if self.missed > MOST_MISSED:
                raise _called_apart()
        return outputs

    def _normalized(self, inputs: Tensor) -> Tensor:
        by_batch = self.training or self.running_mean is None
        if not (self._fits(inputs) and (_shape(inputs)[0] > 1 if by_batch else not self._needs_gradient(inputs))):
            outputs: Tensor = FUNCTIONS[self.activation](super().forward(inputs))
            return outputs
        weight = torch.ones(self.num_features, dtype=torch.float32) if self.weight is None else self.weight
        bias = torch.zeros(self.num_features, dtype=torch.float32) if self.bias is None else self.bias
        if by_batch:
            settings = (*self._running_statistics(), self.eps, self.activation)
            normalized: Tensor = _NormalizedByBatch.apply(inputs, weight, bias, *settings)
            return normalized
        assert self.running_mean is not None
        assert self.running_var is not None
        scale = weight * (self.running_var.double() + self.eps).rsqrt()
        affine = torch.stack([scale, bias - self.running_mean * scale])
        outputs = torch.empty_like(inputs)
        numba_runtime.launch(batch_norm.affine, _shape(inputs), inputs, affine, outputs, variant=self.activation)
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

    def _needs_gradient(self, inputs: Tensor) -> bool:
        """Whether gradients are needed. There is a gradient kernel for training mode only."""
        values = (inputs, self.weight, self.bias)
        return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in values)

    def _running_statistics(self) -> tuple[Tensor, Tensor, float]:
        """Running mean, running variance and momentum. Without running statistics: unused memory, and 0 as momentum."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            mean, variance = torch.zeros((2, self.num_features), dtype=torch.float32)
            return mean, variance, 0.0
        return self.running_mean, self.running_var, self.count_batch()


class FusedActivation(nn.Module):
    """In the place of an activation that a fused batch norm before it has computed. The outputs are the inputs.

    An ``nn.Sequential`` calls both one after the other. A network that calls only a part of it, such as
    ``self.layers[:2](x)``, would get wrong outputs, so that is an error.
    """

    def __init__(self, layer: FusedBatchNorm) -> None:
        super().__init__()
        self._layer = [layer]  # in a list: it is no child of this module

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs``: any shape.

        Raises:
            ConfigError: they are not the outputs of the batch norm.
        """
        (layer,) = self._layer
        if layer.latest is None or layer.latest() is not inputs:
            raise _called_apart()
        layer.latest, layer.missed = None, 0
        return inputs


def _called_apart() -> ConfigError:
    return ConfigError(
        "train.compile=auto: it fuses a batch norm and the activation after it in an nn.Sequential, and this network "
        "calls them apart, as in self.layers[:2](x). Set train.compile=never"
    )


def _shape(values: Tensor) -> tuple[int, int]:
    """Rows and columns of a kernel's matrix: pixels and channels."""
    return values.numel() // values.shape[1], values.shape[1]


class _NormalizedByBatch(torch.autograd.Function):
    """Batch norm in training and an activation. It updates the running statistics in place."""

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
        arrays = (inputs, weight, bias, running_mean, running_variance, outputs, statistics, _workspace(columns))
        numba_runtime.launch(
            batch_norm.batch_norm, (rows, columns), *arrays, numbers=(eps, momentum), variant=activation
        )
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
        arrays = (gradient, inputs, statistics, outputs, parameters, _workspace(columns))
        numba_runtime.launch(batch_norm.batch_norm_gradient, (rows, columns), *arrays, variant=context.activation)
        return outputs, *parameters, None, None, None, None, None


def _workspace(columns: int) -> Tensor:
    """Memory for a kernel's sums."""
    return torch.empty((batch_norm.CHUNKS, 2, columns), dtype=torch.float64)


class WinogradConvolution(nn.Conv2d):
    """A 3x3 convolution, stride 1, padding 1, under autocast: inputs are bfloat16, the weight is float32."""

    @classmethod
    def of(cls, layer: nn.Conv2d) -> Self:
        """The replacement for ``layer``. Both share their parameters."""
        sizes = layer.in_channels, layer.out_channels
        # On the meta device: drawing initial values would advance the random number generator.
        made = cls(*sizes, 3, padding=1, bias=layer.bias is not None, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        return made.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, H, W)."""
        fits = (
            torch.is_autocast_enabled("cpu")  # otherwise PyTorch refuses different dtypes
            and torch.get_autocast_dtype("cpu") == torch.bfloat16
            and _fits(input, torch.bfloat16)
            and winograd.fits(input, self.weight)
            and (self.bias is None or self.bias.dtype == torch.float32)
        )
        if not fits:
            return super().forward(input)
        outputs: Tensor = _Convolution.apply(input, self.weight, self.bias)
        return outputs


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(inputs, weight)
        return winograd.convolve(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = context.saved_tensors
        for_inputs, for_weight, for_bias = context.needs_input_grad
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        inputs_gradient = winograd.convolve(gradient, weight, None, backward=True) if for_inputs else None
        if not for_weight and not for_bias:
            return inputs_gradient, None, None
        weights, biases = winograd.gradients(inputs, gradient, weight)
        return inputs_gradient, weights if for_weight else None, biases if for_bias else None


class HalvingMaxPool(nn.MaxPool2d):
    """Max-pooling over 2x2 windows that do not overlap."""

    def __init__(self, dtype: torch.dtype) -> None:
        """``dtype``: the dtype of the inputs."""
        super().__init__(2)
        self.dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H // 2, W // 2)."""
        fits = _fits(input, self.dtype) and min(input.shape[2:]) > 1  # let PyTorch raise its error for smaller images
        outputs: Tensor = _MaxPool.apply(input) if fits else super().forward(input)
        return outputs


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, inputs: Tensor) -> Tensor:
        images, columns, height, width = inputs.shape
        outputs = _empty((images, columns, height // 2, width // 2), inputs.dtype)
        places = torch.empty(outputs.numel(), dtype=torch.uint8)
        numba_runtime.launch(max_pool.max_pool, (images, height, width, columns), inputs, outputs, places)
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
        numba_runtime.launch(max_pool.max_pool_gradient, (images, height, width, columns), gradient, places, outputs)
        return outputs


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
