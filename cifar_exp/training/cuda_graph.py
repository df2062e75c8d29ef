"""A training step that is captured once and replayed: on a GPU, launching a small network's kernels takes longer than
running them.

Source: PyTorch documentation, "CUDA semantics", section on CUDA graphs: fixed buffers, warm-up on a side stream, which
for DDP takes eleven steps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cifar_exp.data.batches import Draw
from cifar_exp.training.optimizers import Muon

Function = Callable[[], None]
Capture = Callable[[Function], Function]
WARM_UP_STEPS = 11  # DDP counts on as many before it is captured


def cuda_graph(function: Function) -> Function:
    """Run ``function`` a few times, then capture it; what is returned replays the same kernels on the same memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_STEPS):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def told(error: BaseException) -> str:
    """What went wrong: where a capture fails for it, CUDA's own error, which comes later, says only that it did."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    lines = [f"{one}" or type(one).__name__ for one in ([error] if first is error else [first, error])]
    return "; then ".join(lines)


class CapturedStep:
    """One step of fixed shape. Each call copies its draw into the buffers that were captured, and replays."""

    def __init__(self, compute: Callable[..., None], draw: Draw, capture: Capture) -> None:
        """``compute`` is captured for draws of as many tensors as ``draw``, of the same shapes."""
        self._buffers = tuple(part.clone() for part in draw)
        self._replay = capture(lambda: compute(*self._buffers))

    def __call__(self, *draw: Tensor) -> None:
        for buffer, part in zip(self._buffers, draw, strict=True):
            buffer.copy_(part, non_blocking=True)
        self._replay()


@contextmanager
def undone(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Whatever steps the block trains, weights, buffers and the optimizer's state are as before, in the same memory.

    State that the optimizer made meanwhile becomes zero, which is where those start that may be captured.
    """
    tensors = [*model.parameters(), *model.buffers()]
    saved = [tensor.detach().clone() for tensor in tensors]
    states = {parameter: _tensors(optimizer, parameter) for parameter in model.parameters()}
    before = {parameter: {name: value.clone() for name, value in state.items()} for parameter, state in states.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
            for parameter, state in before.items():
                for name, value in _tensors(optimizer, parameter).items():
                    value.copy_(state[name]) if name in state else value.zero_()


def _tensors(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    state = optimizer.state.get(parameter, {})
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def may_be_captured(optimizer: Optimizer) -> bool:
    """Whether its steps can be part of a CUDA graph, and its state starts at zero, to which it can be set back."""
    return isinstance(optimizer, Muon) or all(
        group.get("fused") and group.get("capturable", True) and not group.get("dampening")  # the first step has none
        for group in optimizer.param_groups
    )
