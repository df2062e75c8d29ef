"""Batch-norm statistics over ranks: the choices of ``train.batch_norm``.

While it trains, a layer normalises by the mean and variance of a batch: its rank's own, or under ``synchronized`` that
of all ranks. What it uses in an evaluation are running statistics. Each rank has gathered its own, so before they are
used or saved :func:`settle` makes them the same on all ranks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifar_exp.distributed import (
    average_buffers,
    mean_over_ranks,
    rows_of_ranks,
    share_first_ranks_buffers,
    sum_over_ranks,
)
from cifar_exp.schema import BatchNorm


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
        _statistics(layer)[1].add_((mean - overall).square())
    average_buffers(model)


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
    moments = [torch.zeros(3, *_statistics(layer)[0].shape, dtype=torch.float64) for layer in layers]
    with _measuring(model, layers) as counts, torch.no_grad():
        for images in batches:
            model(images)
            for layer, sums in zip(layers, moments, strict=True):
                count = counts[layer]
                mean, variance = (value.double().cpu() for value in _statistics(layer))
                second = variance * (count - 1) / count + mean.square()
                sums += count * torch.stack([torch.ones_like(mean), mean, second])
    for layer, sums in zip(layers, moments, strict=True):
        running_mean, running_variance = _statistics(layer)
        total, first, second = sum_over_ranks(sums.to(running_mean.device))
        if total[0]:
            mean = first / total
            running_mean.copy_(mean)
            running_variance.copy_((second / total - mean.square()) * total / (total - 1))


@contextmanager
def _measuring(model: nn.Module, layers: Sequence[_BatchNorm]) -> Iterator[Mapping[nn.Module, int]]:
    """Running statistics are the last batch's alone meanwhile. Yields how many values of a channel each layer got."""
    was_training, momenta = model.training, [layer.momentum for layer in layers]
    counts: dict[nn.Module, int] = {}
    hooks = [layer.register_forward_pre_hook(partial(_count, counts)) for layer in layers]
    model.eval()
    for layer in layers:
        layer.train()
        layer.momentum = 1.0
    try:
        yield counts
    finally:
        for layer, momentum, hook in zip(layers, momenta, hooks, strict=True):
            layer.momentum = momentum
            hook.remove()
        model.train(was_training)


def synchronized(model: nn.Module, device: torch.device) -> nn.Module:
    """``model`` with batch norms that normalise by the batches of all ranks; parameters and buffers stay the same ones.

    On GPUs these are PyTorch's ``SyncBatchNorm``, which refuses CPU ranks; those get :class:`SynchronizedBatchNorm2d`.
    """
    if device.type != "cpu":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, SynchronizedBatchNorm2d.of(child))
    return model


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm by the mean and variance of all ranks' batches, whose gradients flow through all ranks.

    Two small collectives a layer and step, one forward and one backward. Ranks must have batches of one size.
    """

    @classmethod
    def of(cls, layer: nn.BatchNorm2d) -> "SynchronizedBatchNorm2d":
        """The same layer, its parameters and buffers shared with ``layer``."""
        made = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(made, name, getattr(layer, name))
        return made.train(layer.training)

    def forward(self, images: Tensor) -> Tensor:
        """``images``: (N, C, H, W) -> the same shape and type."""
        if not self.training:
            return super().forward(images)
        inputs = images.float()
        variance, mean = torch.var_mean(inputs, (0, 2, 3), correction=0)
        means, variances = rows_of_ranks(torch.cat([mean, variance])).chunk(2, dim=1)  # (ranks, C) each
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)
        self._track(mean.detach(), variance.detach(), images.numel() // images.shape[1] * len(means))
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            scale = scale * self.weight
        shift = (self.bias if self.affine else 0) - mean * scale
        return (inputs * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(images.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Add to the running statistics. ``count``: values behind them, of each channel over all ranks."""
        if not self.track_running_stats:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
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
