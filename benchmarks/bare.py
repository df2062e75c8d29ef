"""The least code that trains: what the package's loop is measured against."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from workload import PRECISION

Batch = tuple[Tensor, Tensor]


def bare_epoch(model: nn.Module, optimizer: Optimizer, batches: Callable[[], Iterable[Batch]]) -> Callable[[], None]:
    """One pass over ``batches()`` a call: forward, loss, backward, update; the last loss is read at the end."""

    def epoch() -> None:
        model.train()
        for images, labels in batches():
            loss = bare_step(model, optimizer, images, labels)
        loss.item()

    return epoch


def bare_step(
    model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor, precision: torch.dtype = PRECISION
) -> Tensor:
    """One update; the loss, not read."""
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        loss = F.cross_entropy(model(images).float(), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss
