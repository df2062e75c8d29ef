"""Batch-norm statistics over ranks: the choices of ``train.batch_norm``.

While it trains, a layer normalises by the mean and variance of a batch: its rank's own, or under ``synchronized`` that
of all ranks. What it uses in an evaluation are running statistics. Each rank has gathered its own, so before they are
used or saved :func:`settle` makes them the same on all ranks.
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
    differentiable_rows,
    mean_over_ranks,
    share_first_ranks_buffers,
    sum_over_ranks,
)
from cifar_exp.models.replaced_batch_norm import ReplacedBatchNorm
from cifar_exp.system.accelerator import exact


def settle(model: nn.Module, choice: BatchNorm) -> None:
    """Make the running statistics the same on all ranks.

    - ``local``: the first rank's, which are what DDP's own broadcast of buffers leaves.
    - any other: those of all ranks' images together. The mean is the mean of the ranks' means, the variance the mean
      of their variances plus the variance of their means (law of total variance), which an average of variances leaves
      out. Ranks have batches of one size; a share of 1 / images of the variance is left out of account.
    """
    if choice == "local":
        share_first_ranks_buffers(model)
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


def take_over(model: nn.Module, of_ranks: Sequence[Sequence[Tensor]]) -> None:
    """Give ``model`` the buffers of some ranks together, as :func:`settle` would have made them.

    ``of_ranks``: for each rank what ``model.buffers()`` was there; those of one rank are taken as they are.
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
    """Replace the running statistics by those of ``batches`` on all ranks together, as ``trainNetwork`` does at its end
    (``BatchNormalizationStatistics="population"`` in MATLAB's ``trainingOptions``).

    Each layer normalises by the batch, as in training, so that its inputs are what they were there; nothing else of the
    network is in training mode. One pass: moments are summed over batches and ranks in float64 and divided once.

    Args:
        model: on the device of ``batches``.
        batches: this rank's, (B, C, H, W) each. Without any on all ranks the statistics stay.
    """
    layers = batch_norms(model)
    moments = [exact(_statistics(layer)[0].new_zeros((3, layer.num_features))) for layer in layers]
    with _measuring(model, layers) as counts, torch.no_grad():
        for images in batches:
            counts.clear()
            model(images)
            for layer, sums in zip(layers, moments, strict=True):
                if count := counts.get(layer):  # else a layer that this batch has not come through
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
    """Running statistics are the last batch's alone meanwhile. Yields how many values of a channel each layer got."""
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


def synchronized(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` with batch norms that normalise by the batches of all ranks; parameters and buffers stay the same ones.

    On GPUs these are PyTorch's ``SyncBatchNorm``, which refuses CPU ranks; those get :class:`SynchronizedBatchNorm`.
    """
    if device.type != "cpu":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    if isinstance(model, _BatchNorm):
        return SynchronizedBatchNorm.of(model)
    for name, child in model.named_children():
        setattr(model, name, synchronized(child, device))
    return model


class SynchronizedBatchNorm(ReplacedBatchNorm):
    """Batch norm by the mean and variance of all ranks' batches, whose gradients flow through all ranks.

    Two small collectives a layer and step, one forward and one backward. Ranks must have batches of one size.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs``: (N, C, ...) -> the same shape and type."""
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
        """Add to the running statistics. ``count``: values behind them, of each channel over all ranks."""
        if not self.track_running_stats:
            return
        share = self.counted()
        for running, value in zip(_statistics(self), (mean, variance * count / (count - 1)), strict=True):
            running.lerp_(value, share)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The layers that keep running statistics."""
    return [
        layer for layer in model.modules() if isinstance(layer, _BatchNorm) and isinstance(layer.running_mean, Tensor)
    ]


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Running mean and variance, (C,) float32 each."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def _count(counts: dict[nn.Module, int], layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Note how many values of each channel a layer gets."""
    counts[layer] = inputs[0].numel() // inputs[0].shape[1]
