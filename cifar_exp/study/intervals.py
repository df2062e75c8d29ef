"""95 % intervals and tests for means over a few repeats, with numpy and scipy.

A run is one observation, however many blocks of steps it has. The blocks of one run share clocks, memory placement and
neighbours, which differ in the next run; resampling blocks alone would make intervals too narrow. So with repeats,
intervals are Student's t over runs. (A percentile bootstrap over three runs contains the truth in 79 to 95 % of cases.)
Without repeats, blocks are resampled within each run, and the report says so. See Kalibera and Jones 2013, "Rigorous
benchmarking in reasonable time". ``benchmarks/interval_coverage.py`` counts how often intervals contain the truth.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

CONFIDENCE = 0.95
DRAWS = 10_000  # of means; with few repeats the tails are long and need many draws
BLOCK_DRAWS = 1000
ROUNDING = 1e-12  # logarithms and accuracies that differ by less are equal
SEED = 0  # the same figures from the same runs
FEWEST_BLOCKS = 4  # with fewer the spread within a run is unknown


@dataclass(frozen=True)
class Interval:
    """A range that contains the true value in 95 of 100 studies."""

    low: float
    high: float

    def mapped(self, function: Callable[[float], float]) -> "Interval":
        """The interval of a monotonic function of the value."""
        return Interval(*sorted((function(self.low), function(self.high))))

    def around(self, value: float) -> "Interval":
        """Widened to contain ``value``: a median can lie outside the interval of a mean."""
        return Interval(min(self.low, value), max(self.high, value))


@dataclass(frozen=True)
class Means:
    """Means of several samples whose errors share one number of degrees of freedom.

    Attributes:
        values: (k,) the means.
        errors: (k,) their standard errors.
        freedom: degrees of freedom of the errors; 0 where the errors are unknown.
    """

    values: Array
    errors: Array
    freedom: float

    @classmethod
    def of(cls, samples: Sequence[Sequence[float]]) -> "Means":
        """From samples with a common variance, such as the logarithms of the throughput at each device count.

        The pooled variance makes three repeats enough. Where noise grows with the device count, the interval of the
        largest count is too narrow and that of the smallest too wide.
        """
        sizes = np.array([len(sample) for sample in samples])
        values = np.array([np.mean(sample) for sample in samples])
        freedom = float((sizes - 1).sum())
        if not freedom:
            return cls(values, np.full(len(samples), math.nan), 0.0)
        squares = sum(float(np.square(sample - mean).sum()) for sample, mean in zip(samples, values, strict=True))
        spread = math.sqrt(squares / freedom)
        return cls(values, (spread if spread > ROUNDING else 0.0) / np.sqrt(sizes), freedom)

    def interval(self, weights: ArrayLike) -> Interval | None:
        """The interval of the weighted sum of the means; None where the errors are unknown."""
        if not self.freedom:
            return None
        middle, error = float(np.dot(weights, self.values)), self.error(weights)
        reach = error * t_quantile(self.freedom)
        return Interval(middle - reach, middle + reach)

    def draws(self) -> Array:
        """(DRAWS, k) samples of the true means: a parametric bootstrap.

        Each draw has its own variance from the chi-squared distribution. So the percentiles of a sum of means are the
        ends of its t interval, and those of any function of the means follow.
        """
        return np.asarray(self.values + self.errors * _standard_draws(self.freedom, len(self.values)))

    def error(self, weights: ArrayLike) -> float:
        """Standard error of the weighted sum of the means."""
        return math.sqrt(float(np.dot(np.square(weights), self.errors**2)))


@cache
def _standard_draws(freedom: float, count: int) -> Array:
    """(DRAWS, count) of the multivariate t distribution, without the long import of scipy.stats."""
    rng = np.random.default_rng(SEED)
    spread = np.sqrt(freedom / rng.chisquare(freedom, (DRAWS, 1)))
    return np.asarray(spread * rng.standard_normal((DRAWS, count)))


def percentile_interval(draws: Array) -> Interval:
    """The middle 95 % of ``draws``."""
    tail = 50 * (1 - CONFIDENCE)
    return Interval(*map(float, np.percentile(draws, [tail, 100 - tail])))


def block_error(values: Sequence[float]) -> tuple[float, float]:
    """Standard error of the median over a run's blocks, from the noise within the run.

    Neighbouring blocks are correlated, so stretches of sqrt(n) blocks are resampled (circular block bootstrap, Politis
    and Romano 1992). The error is corrected for the small number of stretches, as a sample's standard deviation is.

    Args:
        values: of the n blocks in time order.

    Returns:
        The standard error, and its degrees of freedom; (nan, 0) where there are too few blocks.
    """
    count = len(values)
    if count < FEWEST_BLOCKS:
        return math.nan, 0.0
    length = math.ceil(math.sqrt(count))  # scipy.stats.bootstrap resamples single values, as if they were independent
    stretches = count / length
    starts = np.random.default_rng(SEED).integers(count, size=(BLOCK_DRAWS, math.ceil(stretches), 1))
    chosen = ((starts + np.arange(length)) % count).reshape(BLOCK_DRAWS, -1)[:, :count]
    medians = np.median(np.asarray(values)[chosen], axis=1)
    return float(medians.std() * math.sqrt(stretches / (stretches - 1))), stretches - 1


def difference(
    first: Means, second: Means, weights: tuple[ArrayLike, ArrayLike]
) -> tuple[Interval | None, float | None]:
    """The difference ``second`` - ``first`` of two weighted sums of means: interval and two-sided p (Welch 1947).

    Args:
        first: means with their own errors.
        second: means with their own errors.
        weights: of the first and of the second means.
    """
    # scipy.stats.ttest_ind compares two samples; here each side is a sum of means with pooled noise.
    if not (first.freedom and second.freedom):
        return None, None
    sums = [float(np.dot(own, means.values)) for own, means in zip(weights, (first, second), strict=True)]
    errors = [means.error(own) for own, means in zip(weights, (first, second), strict=True)]
    middle = sums[1] - sums[0]
    error = math.hypot(*errors)
    if error == 0:
        return Interval(middle, middle), float(abs(middle) <= ROUNDING)
    freedom = error**4 / (errors[0] ** 4 / first.freedom + errors[1] ** 4 / second.freedom)
    reach = error * t_quantile(freedom)
    return Interval(middle - reach, middle + reach), t_probability(middle / error, freedom)


def adjusted(probabilities: Sequence[float]) -> list[float]:
    """The p values, adjusted for multiple comparisons (Holm 1979)."""
    # scipy.stats has Benjamini and Hochberg's adjustment, which limits the false discovery rate, but not Holm's.
    order = np.argsort(probabilities)
    scaled = np.asarray(probabilities)[order] * np.arange(len(order), 0, -1)
    result = np.empty(len(order))
    result[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return [float(value) for value in result]


# scipy is imported late: only reports need it. scipy.special has what scipy.stats calls and takes less time to import.


def t_quantile(freedom: float) -> float:
    """Half width of the 95 % interval in standard errors."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def t_probability(value: float, freedom: float) -> float:
    """Two-sided p of Student's t."""
    from scipy.special import stdtr

    return 2 * float(stdtr(freedom, -abs(value)))


def f_probability(value: float, between: float, within: float) -> float:
    """Probability of an F of at least ``value``."""
    from scipy.special import fdtrc

    return float(fdtrc(between, within, value))
