"""CUDA graphs of a training step: capture once, replay at each step.

On a GPU, launching a small network's kernels one by one takes longer than running them.

Source: PyTorch documentation, "CUDA semantics", section on CUDA graphs: static buffers, warm-up on a side stream,
eleven warm-up iterations under DDP.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cifar_exp.data.batches import MicroBatch
from cifar_exp.training.optimizers import Muon

Function = Callable[[], None]
Capture = Callable[[Function], Function]
WARM_UP_STEPS = 11  # warm-up iterations that DDP needs before a capture


def cuda_graph(function: Function) -> Function:
    """Warm up ``function``, then capture it. The returned function replays the same kernels on the same memory."""
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


def capture_problem(error: BaseException) -> str:
    """Why a capture failed, cause first. CUDA's own error comes last and only says that the capture failed."""
    first = error
    while first.__context__ is not None:
        first = first.__context__
    lines = [f"{one}" or type(one).__name__ for one in ([error] if first is error else [first, error])]
    return "; then ".join(lines)


class CapturedStep:
    """A captured step of fixed shape. A call copies its micro-batch into the captured buffers and replays the step."""

    def __init__(self, compute: Callable[..., None], micro_batch: MicroBatch, capture: Capture) -> None:
        """Capture ``compute(*micro_batch)``. Later micro-batches must have the same shapes."""
        self._buffers = tuple(part.clone() for part in micro_batch)
        self._replay = capture(lambda: compute(*self._buffers))

    def __call__(self, *micro_batch: Tensor) -> None:
        for buffer, part in zip(self._buffers, micro_batch, strict=True):
            buffer.copy_(part, non_blocking=True)
        self._replay()


@contextmanager
def rolled_back(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Undo the training steps in the block: weights, buffers and optimizer state are restored in place.

    Optimizer state that the block created becomes zero: ``is_capturable`` accepts only optimizers whose state starts at
    zero.
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


def is_capturable(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step can be part of a CUDA graph, and its state starts at zero."""
    return isinstance(optimizer, Muon) or all(
        # SGD does not apply dampening in its first step, so that step differs from the captured one.
        group.get("fused") and group.get("capturable", True) and not group.get("dampening")
        for group in optimizer.param_groups
    )
