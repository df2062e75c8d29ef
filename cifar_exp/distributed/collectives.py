"""Sums and gathers over ranks."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cifar_exp.system.accelerator import exact, exact_device

T = TypeVar("T")


def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum over all ranks, in place."""
    carried = values.to(exact_device(values.device))
    dist.all_reduce(carried)
    return values if carried is values else values.copy_(carried)


def gathered(value: T) -> list[T]:
    """Each rank's value, by rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def rows(values: Sequence[float], device: torch.device) -> Tensor:
    """Each rank's ``values``, by rank: (ranks, len(values)) float64, on every rank."""
    mine = torch.tensor(values, dtype=torch.float64, device=exact_device(device))
    of_all = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(of_all, mine)
    return torch.stack(of_all)


def wait_for_all() -> None:
    """Return when all ranks have come here."""
    dist.barrier()


def differentiable_rows(row: Tensor) -> Tensor:
    """Each rank's ``row``, by rank: (K,) -> (ranks, K). Gradients flow back to the rank that a row came from."""
    mine = [row if rank == dist.get_rank() else torch.zeros_like(row) for rank in range(dist.get_world_size())]
    of_all: Tensor = _DifferentiableSum.apply(torch.stack(mine))
    return of_all


class _DifferentiableSum(torch.autograd.Function):
    """The sum over ranks. Each rank's loss depends on it, so that the gradients are added up over ranks as well."""

    @staticmethod
    def forward(_context: Any, values: Tensor) -> Tensor:
        return sum_over_ranks(values.clone())

    @staticmethod
    def backward(_context: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0].contiguous().clone())


def mean_over_ranks(values: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor's mean over ranks as float64, in one collective; all are on one device.

    In float64 the mean of equal float32 values is that value, whatever the number of ranks.
    """
    if not values:
        return []
    mean = sum_over_ranks(torch.cat([exact(value.flatten()) for value in values])) / dist.get_world_size()
    return _apart(mean, values)


def average_buffers(model: nn.Module) -> None:
    """Replace floating-point buffers by their mean over ranks."""
    buffers = _floating_buffers(model)
    for buffer, mean in zip(buffers, mean_over_ranks(buffers), strict=True):
        buffer.copy_(mean.to(buffer.dtype))


def share_first_ranks_buffers(model: nn.Module) -> None:
    """Replace floating-point buffers by those of the first rank, in one collective."""
    buffers = _floating_buffers(model)
    if not buffers:
        return
    together = torch.cat([buffer.flatten() for buffer in buffers])
    together = together.to(exact_device(together.device))
    dist.broadcast(together, src=0)
    for buffer, first in zip(buffers, _apart(together, buffers), strict=True):
        buffer.copy_(first)


def _floating_buffers(model: nn.Module) -> list[Tensor]:
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def _apart(together: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of what was flattened and put together, shaped as those in ``like``."""
    parts = together.split([value.numel() for value in like])
    return [part.view_as(value) for part, value in zip(parts, like, strict=True)]
