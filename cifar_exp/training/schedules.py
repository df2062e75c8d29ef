"""Learning-rate schedules: functions from a step, counted from 0, to the factor on the full learning rate."""

import math
from contextlib import suppress
from numbers import Real
from typing import Annotated, Protocol

from annotated_types import Ge, Gt, Le

from cifar_exp.errors import ConfigError

NonNegative = Annotated[float, Ge(0)]


class Schedule(Protocol):
    """A `_target_` of ``conf/schedule`` with its settings bound."""

    def __call__(self, step: int, steps_per_epoch: int, epochs: int) -> float: ...


def piecewise(
    step: int,
    steps_per_epoch: int,
    epochs: int,  # noqa: ARG001
    *,
    drop_factor: Annotated[float, Gt(0), Le(1)],
    drop_period: Annotated[int, Ge(1)],
) -> float:
    """The factor is multiplied by ``drop_factor`` every ``drop_period`` epochs (MATLAB's "piecewise")."""
    return float(drop_factor ** (step // steps_per_epoch // drop_period))


def cosine(step: int, steps_per_epoch: int, epochs: int, *, warmup_epochs: NonNegative) -> float:
    """Half a cosine from 1 to 0 (Loshchilov and Hutter 2017, arXiv:1608.03983), after a linear warm-up."""
    warmup, progress = _warmup_and_progress(step, steps_per_epoch, epochs, warmup_epochs)
    return warmup * 0.5 * (1 + math.cos(math.pi * progress))


def linear(step: int, steps_per_epoch: int, epochs: int, *, warmup_epochs: NonNegative) -> float:
    """A straight line from 1 to 0, after a linear warm-up."""
    warmup, progress = _warmup_and_progress(step, steps_per_epoch, epochs, warmup_epochs)
    return warmup * (1 - progress)


def _warmup_and_progress(step: int, steps_per_epoch: int, epochs: int, warmup_epochs: float) -> tuple[float, float]:
    """The warm-up factor (1 after the warm-up), and the completed share of the steps after the warm-up."""
    warmup_steps = min(round(warmup_epochs * steps_per_epoch), steps_per_epoch * epochs)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1), 0.0
    return 1.0, (step - warmup_steps) / (steps_per_epoch * epochs - warmup_steps)


def learning_rates(schedule: Schedule, full_rate: float, steps_per_epoch: int, epochs: int) -> tuple[float, ...]:
    """The learning rate of every step of the run, in order.

    Raises:
        ConfigError: the schedule does not return a number of at least 0.
    """
    return tuple(
        full_rate * _factor(schedule(step=step, steps_per_epoch=steps_per_epoch, epochs=epochs), step)
        for step in range(steps_per_epoch * epochs)
    )


def _factor(value: object, step: int) -> float:
    """A schedule's value as a number: Python's, NumPy's, or a tensor of one element."""
    number = math.nan
    if isinstance(value, Real) or (getattr(value, "ndim", None) == 0 and hasattr(value, "item")):
        with suppress(TypeError, ValueError, RuntimeError, OverflowError):  # such as a complex tensor
            number = float(value)  # type: ignore[arg-type]
    if not 0 <= number < math.inf:
        raise ConfigError(
            f"schedule: it returns {value!r:.60} at step {step}, counted from 0. It must return a number of at least "
            f"0, the factor on the learning rate. Correct it, or set schedule=cosine"
        )
    return number
