"""Optimizers that torch.optim does not have."""

from collections.abc import Iterable
from typing import Annotated, Any, Protocol

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torch.optim import Optimizer


class OptimizerFactory(Protocol):
    """A `_target_` of ``conf/optimizer`` with its settings bound."""

    def __call__(self, params: Iterable[Tensor], *, lr: float) -> Optimizer: ...


class Muon(Optimizer):
    """Orthogonalized momentum updates for convolutions, Nesterov SGD for all other parameters.

    torch.optim.Muon accepts only 2-D parameters. Here a convolution's weight is reshaped to a matrix (out, in * k * k),
    and its update is orthogonalized by five Newton-Schulz steps. The weight is rescaled to norm sqrt(out) before each
    update. So one ``lr`` suits layers of all sizes.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks", with the coefficients of its
    reference implementation.

    Args:
        params: the parameters to train. Four dimensions: convolution weights; one: biases and batch norms; else
            matrices.
        lr: learning rate of the orthogonalized updates.
        momentum: momentum of the orthogonalized updates.
        sgd_lr_ratio: learning rate of matrices, as a multiple of ``lr``.
        bias_lr_ratio: learning rate of biases, as a multiple of ``lr``; there are few, and large steps do no harm.
        sgd_momentum: momentum of matrices and biases.
        weight_decay: of matrices and biases. A step shrinks them by ``lr`` x ``weight_decay``, without their ratio.

    A group's ``lr`` may be a tensor on the parameters' device, for steps in a CUDA graph.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: Annotated[float, Gt(0)],
        momentum: Annotated[float, Ge(0), Lt(1)],
        sgd_lr_ratio: Annotated[float, Gt(0)],
        bias_lr_ratio: Annotated[float, Gt(0)],
        sgd_momentum: Annotated[float, Ge(0), Lt(1)],
        weight_decay: Annotated[float, Ge(0)],
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


def orthogonalized(matrix: Tensor, steps: int = 5) -> Tensor:
    """The matrix with the singular vectors of ``matrix`` and singular values near 1, by a quintic iteration.

    Args:
        matrix: (M, N) float32.
        steps: iterations; five bring the singular values to about 0.7 to 1.2, close enough for an update.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # the steepest slope at 0 for which the iteration still converges (Jordan 2024)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = torch.mm(wide, wide.T)
        wide = a * wide + torch.mm(b * gram + c * torch.mm(gram, gram), wide)
    return wide if matrix.shape[0] <= matrix.shape[1] else torch.t(wide)
