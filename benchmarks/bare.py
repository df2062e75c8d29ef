"""A minimal training loop: the baseline for the package's loop."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from workload import DEVICE, PRECISION

from cifar_exp.data.batches import TrainBatches

Batch = tuple[Tensor, Tensor]


def bare_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Callable[[], Iterable[Batch]],
    precision: torch.dtype = PRECISION,
) -> Callable[[], None]:
    """A function that trains one pass over ``batches()``: forward, loss, backward, update. It reads the last loss."""

    def epoch() -> None:
        model.train()
        for images, labels in batches():
            loss = bare_step(model, optimizer, images, labels, precision)
        loss.item()

    return epoch


def graphed_epoch(model: nn.Module, optimizer: Optimizer, batches: TrainBatches) -> Callable[[], None]:
    """Like :func:`bare_epoch`, but each step, including its batch, replays a CUDA graph.

    This follows PyTorch's documentation ("CUDA semantics", whole-network capture).
    """
    draw = [part.clone() for part in batches.example()]
    last_loss = torch.zeros((), device=DEVICE)

    def step() -> None:
        last_loss.copy_(bare_step(model, optimizer, *batches.make(*draw)).detach())

    model.train()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def epoch() -> None:
        for next_draw in batches.micro_batches(1):
            for buffer, part in zip(draw, next_draw, strict=True):
                buffer.copy_(part)
            graph.replay()
        last_loss.item()

    return epoch


def bare_step(
    model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor, precision: torch.dtype = PRECISION
) -> Tensor:
    """One optimizer step. Returns the loss as a tensor on the device."""
    with torch.autocast(DEVICE.type, dtype=precision, enabled=precision != torch.float32):
        loss = F.cross_entropy(model(images).float(), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss
