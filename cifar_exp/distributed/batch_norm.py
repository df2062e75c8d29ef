"""Batch-norm statistics over ranks: the choices of ``train.batch_norm``.

In training, a layer normalizes by the mean and variance of a batch: the batch of its rank, or of all ranks under
``synchronized``. In evaluation it uses running statistics. Each rank has its own, so :func:`combine_over_ranks` makes
them equal before they are used or saved.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_exp.config.schema import BatchNorm
from cifar_exp.distributed.collectives import (
    average_buffers,
    broadcast_buffers,
    differentiable_rows,
    mean_over_ranks,
    sum_over_ranks,
)
from cifar_exp.models.replaced_batch_norm import ReplacedBatchNorm
from cifar_exp.system.accelerator import exact


def combine_over_ranks(model: nn.Module, choice: BatchNorm) -> None:
    """Make the running statistics equal on all ranks.

    - ``local``: use the statistics of rank 0, as DDP's broadcast of buffers does.
    - any other: use the statistics of the images of all ranks. The mean is the mean over ranks. The variance is the
      mean of the variances plus the variance of the means (law of total variance); a mean of variances would lack the
      second part. Ranks have batches of equal size. Bessel's correction is neglected: 1 / images of the variance.
    """
    if choice == "local":
        broadcast_buffers(model)
        return
    layers = batch_norms(model)
    own = [_statistics(layer)[0] for layer in layers]
    for layer, mean, overall in zip(layers, own, mean_over_ranks(own), strict=True):
        _add(_statistics(layer)[1], (exact(mean) - overall).square())
    average_buffers(model)


def _add(buffer: Tensor, more: Tensor) -> None:
    """Add ``more``, float64, to a buffer in place, rounded once."""
    total = exact(buffer)
    buffer.copy_((total + more.to(total.device)).to(buffer.dtype))


def load_combined(model: nn.Module, of_ranks: Sequence[Sequence[Tensor]]) -> None:
    """Load the saved buffers of several ranks, combined as in :func:`combine_over_ranks`.

    ``of_ranks``: ``model.buffers()`` of each rank. The buffers of a single rank are loaded unchanged.
    """
    buffers = list(model.buffers())
    for buffer, *values in zip(buffers, *of_ranks, strict=True):
        buffer.copy_(torch.stack(values).double().mean(0).to(buffer.dtype) if len(values) > 1 else values[0])
    places = {id(buffer): place for place, buffer in enumerate(buffers)}
    for layer in batch_norms(model):
        mean, variance = _statistics(layer)
        means = torch.stack([values[places[id(mean)]] for values in of_ranks]).double()
        _add(variance, means.var(0, correction=0))


def recompute(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Recompute the running statistics over ``batches`` on all ranks, as MATLAB's ``trainNetwork`` does at its end
    (``BatchNormalizationStatistics="population"`` in ``trainingOptions``).

    Each batch norm normalizes by the batch, so its inputs are what they were in training. All other layers are in
    evaluation mode. One pass: moments are summed over batches and ranks in float64, and divided once.

    Args:
        model: on the device of ``batches``.
        batches: this rank's images, (B, C, H, W) each. If no rank has any, the statistics stay unchanged.
    """
    layers = batch_norms(model)
    moments = [exact(_statistics(layer)[0].new_zeros((3, layer.num_features))) for layer in layers]
    with _measuring(model, layers) as counts, torch.no_grad():
        for images in batches:
            counts.clear()
            model(images)
            for layer, sums in zip(layers, moments, strict=True):
                if count := counts.get(layer):  # 0: this batch did not pass the layer
                    mean, variance = (exact(value) for value in _statistics(layer))
                    second = variance * (count - 1) / count + mean.square()
                    sums += count * torch.stack([torch.ones_like(mean), mean, second])
    for layer, sums in zip(layers, moments, strict=True):
        total, first, second = sum_over_ranks(sums)
        if total[0]:
            running_mean, running_variance = _statistics(layer)
            mean = first / total
            running_mean.copy_(mean.to(running_mean.dtype))
            variance = (second / total - mean.square()) * total / (total - 1)
            running_variance.copy_(variance.to(running_variance.dtype))


@contextmanager
def _measuring(model: nn.Module, layers: Sequence[_BatchNorm]) -> Iterator[dict[nn.Module, int]]:
    """Set momentum to 1, so that running statistics are the last batch's.

    Yields:
        The number of values per channel that each layer got.
    """
    was_training, momenta = model.training, [layer.momentum for layer in layers]
    counters = [(layer.num_batches_tracked, int(layer.num_batches_tracked or 0)) for layer in layers]
    counts: dict[nn.Module, int] = {}
    hooks = [layer.register_forward_pre_hook(partial(_count, counts)) for layer in layers]
    model.eval()
    for layer in layers:
        layer.train()
        layer.momentum = 1.0
    try:
        yield counts
    finally:
        for layer, momentum, hook, (counter, before) in zip(layers, momenta, hooks, counters, strict=True):
            layer.momentum = momentum
            hook.remove()
            if counter is not None:
                counter.fill_(before)
        model.train(was_training)


def synchronize_layers(model: nn.Module, device: torch.device) -> nn.Module:
    """Replace batch norms by ones that normalize by the batches of all ranks. Parameters and buffers are shared.

    On GPUs these are PyTorch's ``SyncBatchNorm``. It does not support CPUs, which get :class:`SynchronizedBatchNorm`.
    """
    if device.type != "cpu":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    if isinstance(model, _BatchNorm):
        return SynchronizedBatchNorm.of(model)
    for name, child in model.named_children():
        setattr(model, name, synchronize_layers(child, device))
    return model


class SynchronizedBatchNorm(ReplacedBatchNorm):
    """Batch norm by the mean and variance over all ranks. Gradients flow through all ranks.

    It takes two small collectives per layer and step, one forward and one backward. Ranks must have batches of equal
    size.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs``: (N, C, ...) -> the same shape and dtype."""
        if not self.training:
            return super().forward(inputs)
        values = inputs.float()
        shape = (1, -1, *[1] * (inputs.dim() - 2))
        variance, mean = torch.var_mean(values, [0, *range(2, inputs.dim())], correction=0)
        means, variances = differentiable_rows(torch.cat([mean, variance])).chunk(2, dim=1)  # (ranks, C) each
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        self._track(mean.detach(), variance.detach(), inputs.numel() // inputs.shape[1] * len(means))
        scale = (variance + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return (values * scale.view(shape) + shift.view(shape)).to(inputs.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Update the running statistics. ``count``: values per channel over all ranks."""
        if not self.track_running_stats:
            return
        share = self.count_batch()
        for running, value in zip(_statistics(self), (mean, variance * count / (count - 1)), strict=True):
            running.lerp_(value, share)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The layers with running statistics."""
    return [
        layer for layer in model.modules() if isinstance(layer, _BatchNorm) and isinstance(layer.running_mean, Tensor)
    ]


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Running mean and variance, (C,) float32 each."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def _count(counts: dict[nn.Module, int], layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """A hook: count the values per channel that a layer gets."""
    counts[layer] = inputs[0].numel() // inputs[0].shape[1]
