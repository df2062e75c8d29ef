"""Learning-rate schedules as functions of the step, and optimizers beyond torch.optim.

A schedule is called as ``schedule(step, steps_per_epoch, epochs)`` with ``step`` from 0 and returns the factor on the
full learning rate of that step.
"""

import math
from collections.abc import Iterable
from typing import Annotated, Any, Protocol

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torch.optim import Optimizer

NonNegative = Annotated[float, Ge(0)]


class Schedule(Protocol):
    """What `_target_` of ``conf/schedule`` becomes once its settings are bound."""

    def __call__(self, step: int, steps_per_epoch: int, epochs: int) -> float: ...


class OptimizerFactory(Protocol):
    """What `_target_` of ``conf/optimizer`` becomes once its settings are bound."""

    def __call__(self, params: Iterable[Tensor], *, lr: float) -> Optimizer: ...


def piecewise(
    step: int,
    steps_per_epoch: int,
    epochs: int,  # noqa: ARG001
    *,
    drop_factor: Annotated[float, Gt(0)] = 0.1,
    drop_period: Annotated[int, Ge(1)] = 50,
) -> float:
    """``drop_factor`` to the power of how often ``drop_period`` epochs have gone by (MATLAB's "piecewise")."""
    return float(drop_factor ** (step // steps_per_epoch // drop_period))


def cosine(step: int, steps_per_epoch: int, epochs: int, *, warmup_epochs: NonNegative = 0.0) -> float:
    """Half a cosine from 1 to 0 (Loshchilov and Hutter 2017, arXiv:1608.03983), after a linear warm-up."""
    warmup, progress = _warmup_and_progress(step, steps_per_epoch, epochs, warmup_epochs)
    return warmup * 0.5 * (1 + math.cos(math.pi * progress))


def linear(step: int, steps_per_epoch: int, epochs: int, *, warmup_epochs: NonNegative = 0.0) -> float:
    """A straight line from 1 to 0, after a linear warm-up."""
    warmup, progress = _warmup_and_progress(step, steps_per_epoch, epochs, warmup_epochs)
    return warmup * (1 - progress)


def _warmup_and_progress(step: int, steps_per_epoch: int, epochs: int, warmup_epochs: float) -> tuple[float, float]:
    """The warm-up's factor (1 once it is over) and the share of the remaining steps that are done (0 before)."""
    warmup_steps = min(round(warmup_epochs * steps_per_epoch), steps_per_epoch * epochs)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1), 0.0
    return 1.0, (step - warmup_steps) / (steps_per_epoch * epochs - warmup_steps)


class Muon(Optimizer):
    """Momentum with orthogonalised updates for convolutions and inner matrices, Nesterov SGD for all else.

    torch.optim.Muon takes 2-D parameters alone; here a convolution's weight is seen as (out, in * k * k), its update
    orthogonalised by five Newton-Schulz steps, and the weight kept at a norm of sqrt(out), so that ``lr`` means the
    same for every layer. Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the
    coefficients are those of its reference implementation.

    Args:
        params: the parameters to train; those with four dimensions are convolutions, those with one are biases and
            the like, the rest matrices.
        lr: of the orthogonalised updates.
        momentum: of these.
        sgd_lr_ratio: learning rate of matrices, as a multiple of ``lr``.
        bias_lr_ratio: the same of biases, which are few and may move fast.
        sgd_momentum: of matrices and biases.
        weight_decay: of matrices and biases: a step shrinks them by ``lr`` x ``weight_decay``, whatever their ratio.

    A group's ``lr`` may be a tensor on the parameters' device, for steps that are part of a CUDA graph.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: Annotated[float, Gt(0)] = 0.05,
        momentum: Annotated[float, Ge(0), Lt(1)] = 0.6,
        sgd_lr_ratio: Annotated[float, Gt(0)] = 0.05,
        bias_lr_ratio: Annotated[float, Gt(0)] = 0.3,
        sgd_momentum: Annotated[float, Ge(0), Lt(1)] = 0.85,
        weight_decay: Annotated[float, Ge(0)] = 0.0,
    ) -> None:
        parameters = list(params)
        kernels = [parameter for parameter in parameters if parameter.ndim == 4]
        biases = [parameter for parameter in parameters if parameter.ndim == 1]
        matrices = [parameter for parameter in parameters if parameter.ndim not in (1, 4)]
        sgd = {"orthogonal": False, "momentum": sgd_momentum}
        groups: list[dict[str, Any]] = [
            {"params": kernels, "orthogonal": True, "lr_ratio": 1.0, "momentum": momentum},
            {"params": matrices, "lr_ratio": sgd_lr_ratio, **sgd},
            {"params": biases, "lr_ratio": bias_lr_ratio, **sgd},
        ]
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Update all parameters from their gradients."""
        for group in self.param_groups:
            lr = group["lr"] * group["lr_ratio"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if not group["orthogonal"]:
                    gradient = gradient.add(parameter, alpha=group["weight_decay"] / group["lr_ratio"])
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
                update = gradient.add(buffer, alpha=group["momentum"])
                if group["orthogonal"]:
                    parameter.mul_(len(parameter) ** 0.5 / parameter.norm().clamp_min(1e-12))
                    update = orthogonalized(update.flatten(1)).view_as(parameter)
                if isinstance(lr, Tensor):
                    parameter.addcmul_(update, lr, value=-1)
                else:
                    parameter.add_(update, alpha=-lr)


def may_be_captured(optimizer: Optimizer) -> bool:
    """Whether its steps can be part of a CUDA graph, and its state starts at zero, to which it can be set back."""
    return isinstance(optimizer, Muon) or all(
        group.get("fused") and group.get("capturable", True) and not group.get("dampening")  # the first step has none
        for group in optimizer.param_groups
    )


def orthogonalized(matrix: Tensor, steps: int = 5) -> Tensor:
    """A matrix with the singular vectors of ``matrix`` and singular values near 1, by a quintic iteration.

    Args:
        matrix: (M, N) float32.
        steps: iterations; five bring the singular values to about 0.7 ... 1.2, which is enough for an update.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # steepest at 0 while it stays bounded (Jordan et al. 2024)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = torch.mm(wide, wide.T)
        wide = a * wide + torch.mm(b * gram + c * torch.mm(gram, gram), wide)
    return wide if matrix.shape[0] <= matrix.shape[1] else torch.t(wide)


def learning_rates(schedule: Schedule, full_rate: float, steps_per_epoch: int, epochs: int) -> tuple[float, ...]:
    """The rate of every step of the run, in order."""
    return tuple(full_rate * schedule(step, steps_per_epoch, epochs) for step in range(steps_per_epoch * epochs))
