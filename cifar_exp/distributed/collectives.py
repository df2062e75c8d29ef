"""Collectives: sums, means and gathers over ranks. Every rank must call them, in the same order."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cifar_exp.system.accelerator import exact, exact_device

T = TypeVar("T")


def sum_over_ranks(values: Tensor, group: Any = None) -> Tensor:
    """All-reduce: the element-wise sum over ranks, in place. ``group``: a process group; None: all ranks."""
    carried = values.to(exact_device(values.device))
    dist.all_reduce(carried, group=group)
    return values if carried is values else values.copy_(carried)


def all_gather_objects(value: T) -> list[T]:
    """All-gather of picklable values: each rank's value, in the order of ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather_numbers(values: Sequence[float], device: torch.device) -> Tensor:
    """All-gather of numbers: (ranks, len(values)) float64, in the order of ranks."""
    mine = torch.tensor(values, dtype=torch.float64, device=exact_device(device))
    of_all = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(of_all, mine)
    return torch.stack(of_all)


def wait_for_all() -> None:
    """Wait until all ranks have called this (a barrier)."""
    dist.barrier()


def differentiable_rows(row: Tensor) -> Tensor:
    """All-gather with gradients: (K,) -> (ranks, K). Each row's gradient flows back to its rank."""
    mine = [row if rank == dist.get_rank() else torch.zeros_like(row) for rank in range(dist.get_world_size())]
    of_all: Tensor = _DifferentiableSum.apply(torch.stack(mine))
    return of_all


class _DifferentiableSum(torch.autograd.Function):
    """The sum over ranks. Every rank's loss depends on it, so its gradient is the sum over ranks, too."""

    @staticmethod
    def forward(_context: Any, values: Tensor) -> Tensor:
        return sum_over_ranks(values.clone())

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0].contiguous().clone())


def mean_over_ranks(values: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor's mean over ranks, as float64, in one collective. All tensors are on one device.

    In float64, the mean of equal float32 values is exactly that value on any number of ranks.
    """
    if not values:
        return []
    mean = sum_over_ranks(torch.cat([exact(value.flatten()) for value in values])) / dist.get_world_size()
    return _split_like(mean, values)


def average_buffers(model: nn.Module) -> None:
    """Replace floating-point buffers by their mean over ranks."""
    buffers = _floating_buffers(model)
    for buffer, mean in zip(buffers, mean_over_ranks(buffers), strict=True):
        buffer.copy_(mean.to(buffer.dtype))


def broadcast_buffers(model: nn.Module) -> None:
    """Replace floating-point buffers by those of rank 0, in one collective."""
    buffers = _floating_buffers(model)
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    flat = flat.to(exact_device(flat.device))
    dist.broadcast(flat, src=0)
    for buffer, first in zip(buffers, _split_like(flat, buffers), strict=True):
        buffer.copy_(first)


@torch.no_grad()
def broadcast_state(model: nn.Module) -> None:
    """Replace all parameters and buffers by those of rank 0."""
    for value in model.state_dict().values():
        carried = value.to(exact_device(value.device))
        dist.broadcast(carried, src=0)
        if carried is not value:
            value.copy_(carried)


def _floating_buffers(model: nn.Module) -> list[Tensor]:
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def _split_like(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Split a flat tensor into parts with the shapes of those in ``like``."""
    parts = flat.split([value.numel() for value in like])
    return [part.view_as(value) for part, value in zip(parts, like, strict=True)]
