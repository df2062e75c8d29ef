"""Schedules have the values of their formulas; Muon takes the steps of an independently written one."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar_exp.training.cuda_graph import is_capturable
from cifar_exp.training.optimizers import orthogonalized
from cifar_exp.training.schedules import cosine, learning_rates, linear, piecewise
from tests.helpers.configs import muon

Array = NDArray[np.float64]


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 1.0), (29, 1.0), (30, 0.5), (59, 0.5), (60, 0.25), (89, 0.25), (99, 0.125)]
)
def test_piecewise_drops_after_every_period(step: int, factor: float) -> None:
    assert piecewise(step, 10, 10, drop_factor=0.5, drop_period=3) == pytest.approx(factor)


def test_cosine_falls_along_half_a_cosine_towards_zero() -> None:
    assert cosine(0, 5, 2, warmup_epochs=0) == 1.0
    for step in range(10):
        assert cosine(step, 5, 2, warmup_epochs=0) == pytest.approx((1 + math.cos(math.pi * step / 10)) / 2)
    assert cosine(5, 5, 2, warmup_epochs=0) == pytest.approx(0.5)
    assert 0 < cosine(9, 5, 2, warmup_epochs=0) < 0.03


def test_linear_falls_along_a_straight_line_towards_zero() -> None:
    assert [linear(step, 5, 2, warmup_epochs=0) for step in range(10)] == pytest.approx(
        [1 - step / 10 for step in range(10)]
    )


@pytest.mark.parametrize("schedule", [cosine, linear])
def test_warm_up_rises_in_a_line_from_above_zero_to_the_full_rate(schedule: type[float]) -> None:
    """Half an epoch of 8 steps: 1/5, 2/5, 3/5, 4/5, then full at step 4 and down over the 12 that are left."""
    factors = [schedule(step, 8, 2, warmup_epochs=0.5) for step in range(16)]  # type: ignore[call-arg]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[10] == pytest.approx(0.5)
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[15] < 0.1


@pytest.mark.parametrize("schedule", [cosine, linear])
def test_a_warm_up_longer_than_the_run_only_rises(schedule: type[float]) -> None:
    factors = [schedule(step, 4, 1, warmup_epochs=9.0) for step in range(4)]  # type: ignore[call-arg]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_learning_rates_are_the_schedule_times_the_full_rate_at_every_step() -> None:
    assert learning_rates(partial(linear, warmup_epochs=0), 0.4, 2, 2) == pytest.approx((0.4, 0.3, 0.2, 0.1))


def matrix(rows: int, columns: int, singular: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A random matrix with these singular values, and its singular vectors."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    left = torch.linalg.qr(torch.randn(rows, len(singular), generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, len(singular), generator=generator))[0]
    return left @ singular.diag() @ right.T, left, right


@pytest.mark.parametrize(("rows", "columns"), [(24, 6), (6, 24), (12, 12), (64, 27)])
def test_orthogonalized_keeps_the_singular_vectors_and_brings_the_values_near_one(rows: int, columns: int) -> None:
    singular = torch.linspace(0.05, 5.0, min(rows, columns))
    given, left, right = matrix(rows, columns, singular)
    assert torch.linalg.cond(given) > 50
    result = orthogonalized(given)
    assert result.shape == given.shape
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6
    assert values.max() < 1.3
    rotated = left.T @ result @ right  # diagonal where the singular vectors are the same
    assert (rotated - rotated.diag().diag()).abs().max() < 1e-4


def test_orthogonalized_does_not_depend_on_the_size_of_the_gradient() -> None:
    given = matrix(8, 18, torch.linspace(0.5, 2, 8))[0]
    torch.testing.assert_close(orthogonalized(1000 * given), orthogonalized(given), atol=1e-4, rtol=0)
    assert not orthogonalized(torch.zeros(8, 18)).any()


def slow_orthogonalized(given: Array) -> Array:
    """The odd polynomial applied five times to each singular value, in float64: no matrix iteration."""
    left, singular, right = np.linalg.svd(given, full_matrices=False)
    singular = singular / math.sqrt(sum(value**2 for value in singular))
    for _ in range(5):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    return np.asarray((left * singular) @ right)


def slow_muon(weight: Array, gradients: list[Array], rates: list[float], momentum: float) -> Array:
    """Nesterov momentum, orthogonalised; the weight is brought to norm sqrt(out) before each update."""
    velocity = np.zeros_like(weight)
    for gradient, lr in zip(gradients, rates, strict=True):
        velocity = momentum * velocity + gradient
        looked_ahead = (gradient + momentum * velocity).reshape(len(weight), -1)
        weight = weight / math.sqrt((weight**2).sum()) * math.sqrt(len(weight))
        weight = weight - lr * slow_orthogonalized(looked_ahead).reshape(weight.shape)
    return weight


@pytest.mark.parametrize("rate", [float, torch.tensor])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (40, 4, 3, 3), (6, 6, 1, 1)], ids=["wide", "tall", "square"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_two_muon_steps_equal_a_plain_implementation(
    shape: tuple[int, ...],
    momentum: float,
    memory_format: torch.memory_format,
    rate: Callable[[float], float | Tensor],
) -> None:
    """The learning rate is read at each step, and the memory layout does not matter."""
    generator = torch.Generator().manual_seed(0)
    weight, *gradients = (torch.randn(shape, generator=generator) for _ in range(3))
    parameter = torch.nn.Parameter(weight.clone(memory_format=memory_format))
    optimizer = muon()([parameter], lr=1.0, momentum=momentum)
    for gradient, lr in zip(gradients, (0.05, 0.02), strict=True):
        optimizer.param_groups[0]["lr"] = rate(lr)
        parameter.grad = gradient.clone(memory_format=memory_format)
        optimizer.step()
    expected = slow_muon(
        weight.double().numpy(), [gradient.double().numpy() for gradient in gradients], [0.05, 0.02], momentum
    )
    np.testing.assert_allclose(parameter.detach().numpy(), expected, atol=2e-5)


def test_muon_has_momentum() -> None:
    """After gradients g and 0 the second update still follows g; without momentum there is none."""
    for momentum, moves in ((0.6, True), (0.0, False)):
        parameter = torch.nn.Parameter(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1)))
        optimizer = muon()([parameter], lr=0.1, momentum=momentum)
        parameter.grad = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(2))
        optimizer.step()
        before = parameter.detach() * 2 / parameter.detach().norm()
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert ((parameter - before).norm() > 0.1) == moves


def test_muon_uses_nesterov_sgd_for_other_parameters() -> None:
    """Matrices and biases have their own learning rates; weight decay shrinks both by lr x weight_decay."""
    generator = torch.Generator().manual_seed(0)
    initial = [torch.randn(shape, generator=generator) for shape in ((5, 7), (5,), (2, 3, 4))]
    ratios = [3.0, 0.5, 3.0]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in initial] for _ in range(2))
    kernel = torch.nn.Parameter(torch.randn(4, 3, 3, 3, generator=generator))
    settings = {"sgd_lr_ratio": 3.0, "bias_lr_ratio": 0.5, "sgd_momentum": 0.7, "weight_decay": 0.05}
    optimizer = muon()([ours[0], kernel, *ours[1:]], lr=1.0, momentum=0.2, **settings)
    groups = [
        {"params": [parameter], "weight_decay": 0.05 / ratio} for parameter, ratio in zip(theirs, ratios, strict=True)
    ]
    sgd = torch.optim.SGD(groups, lr=1.0, momentum=0.7, nesterov=True)
    for lr in (0.1, 0.1, 0.03, 0.01):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for group in optimizer.param_groups:
            group["lr"] = lr
        for group, ratio in zip(sgd.param_groups, ratios, strict=True):
            group["lr"] = ratio * lr
        optimizer.step()
        sgd.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-6)
    assert len(optimizer.param_groups) == 3


def test_muon_leaves_parameters_without_a_gradient_alone() -> None:
    kernel = torch.nn.Parameter(torch.ones(4, 3, 3, 3))
    bias = torch.nn.Parameter(torch.ones(4))
    muon()([kernel, bias], lr=0.05, weight_decay=0.1).step()
    assert torch.equal(kernel, torch.ones(4, 3, 3, 3))
    assert torch.equal(bias, torch.ones(4))


@pytest.mark.parametrize(
    ("make", "settings", "may_be"),
    [
        (muon(), {}, True),
        (torch.optim.SGD, {"momentum": 0.9, "fused": True}, True),
        (torch.optim.SGD, {"momentum": 0.9}, False),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "fused": True}, False),
        (torch.optim.AdamW, {"fused": True, "capturable": True}, True),
        (torch.optim.AdamW, {"fused": True}, False),
        (torch.optim.NAdam, {"capturable": True}, False),  # has no fused one; part of its state starts at one
    ],
)
def test_capturable_optimizers(
    make: Callable[..., torch.optim.Optimizer], settings: dict[str, Any], may_be: bool
) -> None:
    assert is_capturable(make([torch.nn.Parameter(torch.zeros(2, 2))], lr=0.1, **settings)) is may_be
