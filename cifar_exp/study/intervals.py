"""How sure a mean over a few repeats is: 95 % intervals and tests. Pure numpy, and scipy's t and F distributions.

A run counts as one observation, however many blocks of steps it has: what the blocks of one run share (clocks, memory
placement, neighbours) is other in the next run, and resampling blocks alone would call a figure surer than it is. The
spread between repeats holds the noise of their blocks already. So where there are repeats, intervals rest on Student's
t over runs; a percentile bootstrap over three of them holds the truth in 79 to 95 % of cases, by what the noise is made
of. Only where there are none, blocks are resampled within each run, and whoever shows the interval has to say so. See
Kalibera and Jones 2013, "Rigorous benchmarking in reasonable time". ``benchmarks/coverage.py`` counts how often the
truth is held.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

CONFIDENCE = 0.95
DRAWS = 10_000  # of means: with few repeats the tails are long, and their ends need many draws
BLOCK_DRAWS = 1000
ROUNDING = 1e-12  # logarithms and accuracies that differ by less are equal
SEED = 0  # the same figures from the same runs
FEWEST_BLOCKS = 4  # with fewer the spread within a run is not known at all


@dataclass(frozen=True)
class Interval:
    """A range that holds the true value in 95 of 100 studies."""

    low: float
    high: float

    def mapped(self, function: Callable[[float], float]) -> "Interval":
        """The interval of a function of the value that only rises or only falls."""
        return Interval(*sorted((function(self.low), function(self.high))))

    def around(self, value: float) -> "Interval":
        """Widened as far as to hold ``value``: a median can lie beside the interval of a mean."""
        return Interval(min(self.low, value), max(self.high, value))


@dataclass(frozen=True)
class Means:
    """Means of several samples whose errors share one number of degrees of freedom.

    Attributes:
        values: (k,) the means.
        errors: (k,) their standard errors.
        freedom: degrees of freedom of the errors; 0 where nothing is known of them.
    """

    values: Array
    errors: Array
    freedom: float

    @classmethod
    def of(cls, samples: Sequence[Sequence[float]]) -> "Means":
        """From samples that have one spread in common, such as the logarithms of the rates of each device count.

        Pooling it over the samples is what makes three repeats enough. Where noise grows with the device count, the
        interval of the largest count is too narrow and that of the smallest too wide.
        """
        sizes = np.array([len(sample) for sample in samples])
        values = np.array([np.mean(sample) for sample in samples])
        freedom = float((sizes - 1).sum())
        if not freedom:
            return cls(values, np.full(len(samples), math.nan), 0.0)
        spread = math.sqrt(_squares(samples, values) / freedom)
        return cls(values, (spread if spread > ROUNDING else 0.0) / np.sqrt(sizes), freedom)

    def interval(self, weights: ArrayLike) -> Interval | None:
        """Of the means' sum with these ``weights``; None where nothing is known of the errors."""
        if not self.freedom:
            return None
        middle, error = float(np.dot(weights, self.values)), self.error(weights)
        reach = error * t_quantile(self.freedom)
        return Interval(middle - reach, middle + reach)

    def draws(self) -> Array:
        """(DRAWS, k) means as they may truly be: a parametric bootstrap.

        Each draw has a spread of its own from the chi-squared distribution, so that the percentiles of a sum of means
        are the ends of its t interval, and those of any function of the means follow.
        """
        return np.asarray(self.values + self.errors * _standard_draws(self.freedom, len(self.values)))

    def error(self, weights: ArrayLike) -> float:
        """Standard error of the means' sum with these ``weights``."""
        return math.sqrt(float(np.dot(np.square(weights), self.errors**2)))


@cache
def _standard_draws(freedom: float, count: int) -> Array:
    """(DRAWS, count) of the multivariate t distribution."""
    rng = np.random.default_rng(SEED)
    spread = np.sqrt(freedom / rng.chisquare(freedom, (DRAWS, 1)))
    return np.asarray(spread * rng.standard_normal((DRAWS, count)))


def percentile_interval(draws: Array) -> Interval:
    """The middle 95 % of ``draws``."""
    tail = 50 * (1 - CONFIDENCE)
    return Interval(*map(float, np.percentile(draws, [tail, 100 - tail])))


def block_error(values: Sequence[float]) -> tuple[float, float]:
    """How far the median of a run's blocks may be off by what happened within the run.

    Neighbouring blocks are alike, so stretches of sqrt(n) of them are resampled (circular block bootstrap, Politis and
    Romano 1992); the error is enlarged by what so few stretches miss, as a sample's standard deviation is.

    Args:
        values: of the n blocks in the order of time.

    Returns:
        The standard error, and its degrees of freedom; (nan, 0) where there are too few blocks.
    """
    count = len(values)
    if count < FEWEST_BLOCKS:
        return math.nan, 0.0
    length = math.ceil(math.sqrt(count))
    stretches = count / length
    starts = np.random.default_rng(SEED).integers(count, size=(BLOCK_DRAWS, math.ceil(stretches), 1))
    chosen = ((starts + np.arange(length)) % count).reshape(BLOCK_DRAWS, -1)[:, :count]
    medians = np.median(np.asarray(values)[chosen], axis=1)
    return float(medians.std() * math.sqrt(stretches / (stretches - 1))), stretches - 1


def difference(
    first: Means, second: Means, weights: tuple[ArrayLike, ArrayLike]
) -> tuple[Interval | None, float | None]:
    """Of two sums of means with errors of their own, ``second`` minus ``first``: interval and two-sided p (Welch 1947).

    Args:
        first: the means that are compared with.
        second: the means that are compared.
        weights: of the first means in their sum, and of the second: 1 for the one that is compared, or 1 and -1 for
            two whose own difference is.
    """
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
    """Each p as it counts among all of them, so that one of many is not found by chance alone (Holm 1979)."""
    order = np.argsort(probabilities)
    scaled = np.asarray(probabilities)[order] * np.arange(len(order), 0, -1)
    result = np.empty(len(order))
    result[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return [float(value) for value in result]


def variance_ratio(samples: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """One-way analysis of variance: F of the samples' means, and its degrees of freedom (Fisher 1925).

    Returns:
        F (infinite where no sample spreads but their means differ, nan where all values are equal), the degrees of
        freedom between the samples, and those within them.
    """
    sizes = np.array([len(sample) for sample in samples])
    means = np.array([np.mean(sample) for sample in samples])
    total = float(np.dot(sizes, means) / sizes.sum())
    between, within = len(samples) - 1, float((sizes - 1).sum())
    spread = _squares(samples, means)
    explained = float(np.dot(sizes, (means - total) ** 2))
    if spread <= ROUNDING**2:
        return (math.inf if explained > ROUNDING**2 else math.nan), between, within
    return (explained / between) / (spread / within), between, within


def _squares(samples: Sequence[Sequence[float]], means: Array) -> float:
    """Squared distances of all values from the means of their samples, summed."""
    return sum(float(((np.asarray(sample) - mean) ** 2).sum()) for sample, mean in zip(samples, means, strict=True))


# scipy.special takes a tenth of a second to import, and only reports need it.


def t_quantile(freedom: float) -> float:
    """How many standard errors the 95 % interval reaches to each side."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def t_probability(value: float, freedom: float) -> float:
    """Two-sided p of Student's t."""
    from scipy.special import stdtr

    return 2 * float(stdtr(freedom, -abs(value)))


def f_probability(value: float, between: float, within: float) -> float:
    """P of an F at least as large as ``value``."""
    from scipy.special import fdtrc

    return float(fdtrc(between, within, value))
