"""Fit Amdahl's and Gustafson's law to measured throughput, to estimate the serial fraction of the work.

Both give the throughput of n devices relative to one, for a serial fraction f:

- Amdahl 1967, of a fixed amount of work: 1 / (f + (1 - f) / n). The time of a step is a + b / n.
- Gustafson 1988, of work that grows with the devices: f + (1 - f) n. The throughput is c + d n.

Each is a straight line, in 1 / n or in n, and f is its intercept's share of the value at n = 1. Least squares of
relative errors fit the line.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from cifar_exp.study.intervals import ROUNDING, Array, Interval, Means

Name = Literal["Amdahl", "Gustafson"]
NOISE_LEVEL = 0.05  # significance level of the lack-of-fit test
DIFFERENCE = 1e-5  # of logarithms, for derivatives


@dataclass(frozen=True)
class Fit:
    """One law, fitted to measured throughput.

    Attributes:
        law: ``Amdahl`` or ``Gustafson``.
        serial_fraction: as fitted; outside 0 to 1 the law does not describe the measurements.
        interval: of the serial fraction; None if the noise is unknown.
        devices: the largest measured device count.
        gain: predicted throughput of twice as many devices / throughput of ``devices``.
        gain_interval: of the gain.
        warnings: reasons to doubt the fit.
    """

    law: Name
    serial_fraction: float
    interval: Interval | None
    devices: int
    gain: float
    gain_interval: Interval | None
    warnings: Sequence[str]

    def speedup(self, devices: float, over: float = 1) -> float:
        """Throughput of ``devices`` / throughput of ``over`` devices."""
        fraction = self.serial_fraction
        return relative_rate(self.law, fraction, devices) / relative_rate(self.law, fraction, over)

    def __str__(self) -> str:
        sure = f" [{self.interval.low:.1%}, {self.interval.high:.1%}]" if self.interval else ""
        gain = f" [{self.gain_interval.low:.2f}, {self.gain_interval.high:.2f}]" if self.gain_interval else ""
        return (
            f"{self.law}'s law: serial fraction {self.serial_fraction:.1%}{sure}; {2 * self.devices} devices instead "
            f"of {self.devices} would give {self.gain:.2f}{gain} times the throughput"
        )


def relative_rate(law: Name, fraction: float, devices: float) -> float:
    """Throughput of ``devices`` / throughput of one."""
    if law == "Amdahl":
        seconds = fraction + (1 - fraction) / devices
        return 1 / seconds if seconds > 0 else math.inf  # of a fraction below 0
    return fraction + (1 - fraction) * devices


def fitted(law: Name, counts: Sequence[int], log_rates: Means) -> Fit:
    """Fit ``law`` to the throughput at two or more device counts.

    The interval of the fraction is Welch's of its linearization in the logarithms (delta method).

    Args:
        law: the law to fit.
        counts: the device counts, in ascending order.
        log_rates: means of the logarithms of their throughput.
    """
    devices = np.array(counts, dtype=float)
    fraction = float(serial_fractions(law, counts, log_rates.values))
    interval = gain_interval = None
    estimate = log_rates.sum(_gradient(lambda rates: serial_fractions(law, counts, rates), log_rates.values))
    if estimate:
        interval = replace(estimate, value=fraction).interval()
        gain_interval = interval.mapped(lambda value: _gain(law, value, counts[-1]))
    warnings = [*_design_warnings(counts), *_residual_warnings(law, devices, log_rates)]
    if not -ROUNDING <= fraction <= 1 + ROUNDING:
        why = "more than the ideal speedup" if fraction < 0 else "more devices are slower than one"
        warnings.append(f"{law}'s serial fraction of {fraction:.1%} lies outside 0 to 1: {why}")
    return Fit(law, fraction, interval, counts[-1], _gain(law, fraction, counts[-1]), gain_interval, warnings)


def serial_fractions(law: Name, counts: Sequence[int], log_rates: Array) -> Array:
    """The fitted serial fractions of many studies: (..., k) logarithms of throughput -> (...)."""
    start, slope = _line(law, np.array(counts, dtype=float), log_rates)
    return start / (start + slope)


def _line(law: Name, devices: Array, log_rates: Array) -> tuple[Array, Array]:
    """Intercept and slope of the law's line through each (..., k) of ``log_rates``: least squares of relative errors.

    Counts have equal weights: weights from a few repeats would be noise themselves. Units are arbitrary.
    """
    rates = np.exp(log_rates - log_rates.mean(-1, keepdims=True))
    across, up = (1 / devices, 1 / rates) if law == "Amdahl" else (devices, rates)
    weights = 1 / up**2
    total = weights.sum(-1)
    middle_across, middle_up = (weights * across).sum(-1) / total, (weights * up).sum(-1) / total
    offset = across - middle_across[..., None]
    slope = (weights * offset * up).sum(-1) / (weights * offset**2).sum(-1)
    return middle_up - slope * middle_across, slope


def _residuals(law: Name, devices: Array, log_rates: Array) -> Array:
    """(..., k) logarithms of throughput -> their distances from those of the fitted line."""
    start, slope = (end[..., None] for end in _line(law, devices, log_rates))
    line = start + slope * (1 / devices if law == "Amdahl" else devices)
    if np.any(line <= 0):  # the law predicts no throughput there: it is far from the measurements
        return np.full_like(log_rates, math.nan)
    centered = log_rates - log_rates.mean(-1, keepdims=True)
    return np.asarray(centered - np.log(1 / line if law == "Amdahl" else line))


def _gradient(function: Callable[[Array], Array], at: Array) -> Array:
    """Derivatives by central differences: (k,) -> (..., k) for a function of (..., k)."""
    steps = DIFFERENCE * np.eye(len(at))
    ends = function(at + steps), function(at - steps)
    return np.asarray(np.moveaxis((ends[0] - ends[1]) / (2 * DIFFERENCE), 0, -1))


def _gain(law: Name, fraction: float, devices: int) -> float:
    """Predicted throughput of twice the devices / theirs, with the fraction clipped to 0 to 1."""
    fraction = min(1.0, max(0.0, fraction))
    return relative_rate(law, fraction, 2 * devices) / relative_rate(law, fraction, devices)


def _design_warnings(counts: Sequence[int]) -> list[str]:
    if len(counts) > 2:
        return []
    return ["only two device counts: every law fits them, so the fit cannot be tested"]


def _residual_warnings(law: Name, devices: Array, log_rates: Means) -> list[str]:
    """A test of the lack of fit: do the deviations from the law exceed the noise?"""
    residuals = _residuals(law, devices, log_rates.values)
    free = len(residuals) - 2
    changes = _gradient(lambda rates: _residuals(law, devices, rates), log_rates.values)
    if free < 1 or not np.isfinite(changes).all():
        return []
    # Two parameters were fitted, so the residuals only vary in the other directions.
    directions = np.linalg.svd(changes)[0][:, :free].T
    test = log_rates.deviation(directions @ changes, directions @ residuals)
    if not test or test.probability >= NOISE_LEVEL:
        return []
    worst = math.expm1(float(np.abs(residuals).max()))
    return [
        f"the throughput deviates from {law}'s law by up to {worst:.1%}, more than the noise "
        f"(F({test.between}, {test.within:.3g}) = {test.ratio:.3g}, p = {test.probability:.2g})"
    ]
