"""95 % intervals and tests for means over a few repeats, with numpy and scipy.

A run is one observation, however many blocks of steps it has. The blocks of one run share clock frequency, memory
placement and load; these differ in the next run. Resampling blocks alone would make intervals too narrow. So with
repeats, intervals are Student's t over runs. The noise may differ between device counts, so degrees of freedom are
Welch's. Two other methods were simulated for three seeds with such noise. Their intervals contained the truth in 73 to
91 % of sweeps (one variance for all counts) and in 69 to 96 % (percentile bootstrap over three runs). Without repeats,
blocks are resampled within each run, and the report says so. See Kalibera and Jones 2013, "Rigorous benchmarking in
reasonable time".
``benchmarks/interval_coverage.py`` counts how often intervals contain the truth.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

CONFIDENCE = 0.95
BLOCK_DRAWS = 1000
ROUNDING = 1e-12  # logarithms and accuracies that differ by less are equal
SEED = 0  # the same figures from the same runs
FEWEST_FREEDOM = 1.0  # with fewer degrees of freedom there is no interval, since Student's t has no mean
MOST_CONDITION = 1e12  # condition number of a covariance that is inverted


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
class Estimate:
    """A value with noise.

    Attributes:
        value: as measured.
        error: its standard error, above 0.
        freedom: degrees of freedom of the error, at least ``FEWEST_FREEDOM``.
    """

    value: float
    error: float
    freedom: float

    def interval(self) -> Interval:
        """Student's t interval around the value."""
        reach = self.error * t_quantile(self.freedom)
        return Interval(self.value - reach, self.value + reach)

    def probability(self) -> float:
        """Two-sided p of the hypothesis that the true value is 0."""
        return t_probability(self.value / self.error, self.freedom)


@dataclass(frozen=True)
class Means:
    """Means of several samples, each with its own noise.

    Samples such as the throughput at each device count need not have equal variances: the largest count fills the
    machine and is often the noisiest. So nothing is pooled, and sums of means have Welch's degrees of freedom.

    Attributes:
        values: (k,) the means.
        errors: (k,) their standard errors; NaN if unknown.
        freedoms: (k,) degrees of freedom of each error; 0 where unknown.
    """

    values: Array
    errors: Array
    freedoms: Array

    @classmethod
    def of(cls, samples: Sequence[Sequence[float]]) -> "Means":
        """From samples of at least one value. The error of a single value is unknown."""
        values = np.array([np.mean(sample) for sample in samples])
        spreads = [np.std(sample, ddof=1) if len(sample) > 1 else math.nan for sample in samples]
        sizes = np.array([len(sample) for sample in samples])
        return cls(values, np.array(spreads) / np.sqrt(sizes), sizes - 1.0)

    def sum(self, weights: ArrayLike) -> Estimate | None:
        """The weighted sum of the means (Welch 1947, Satterthwaite 1946).

        ``weights``: (k,). Means of weight 0 do not matter.

        Returns:
            None if the noise of the sum is unknown: for a single run, for too few blocks, or if all repeats are equal,
            which does not prove the absence of noise.
        """
        used = np.asarray(weights) != 0
        parts = (np.asarray(weights)[used] * self.errors[used]) ** 2
        error = math.sqrt(float(parts.sum()))
        if np.any(self.freedoms[used] < FEWEST_FREEDOM) or not error > ROUNDING:
            return None
        freedom = float(parts.sum() ** 2 / (parts**2 / self.freedoms[used]).sum())
        return Estimate(float(np.dot(weights, self.values)), error, freedom)

    def deviation(self, contrasts: Array, values: ArrayLike) -> "Deviation | None":
        """Test whether several sums of the means differ from 0 by more than their noise (Johansen 1980).

        With one contrast this is Welch's t test; with the differences of all means it is Welch's analysis of variance.

        Args:
            contrasts: (m, k) the weights of each sum, linearly independent.
            values: (m,) the sums.

        Returns:
            None if the noise is not known.
        """
        if np.any(self.freedoms < FEWEST_FREEDOM):
            return None
        variances = self.errors**2
        covariance = (contrasts * variances) @ contrasts.T
        if not np.linalg.cond(covariance) < MOST_CONDITION:
            return None
        inverse, sums, number = np.linalg.inv(covariance), np.asarray(values), len(contrasts)
        shares = variances * np.einsum("ai,ab,bi->i", contrasts, inverse, contrasts)
        doubt = float((shares**2 / self.freedoms).sum())
        scale = number + 2 * doubt - 6 * doubt / (number + 2)
        return Deviation(float(sums @ inverse @ sums) / scale, number, number * (number + 2) / (3 * doubt))


@dataclass(frozen=True)
class Deviation:
    """An F test.

    Attributes:
        ratio: the F statistic.
        between: degrees of freedom of its numerator.
        within: degrees of freedom of its denominator.
    """

    ratio: float
    between: int
    within: float

    @property
    def probability(self) -> float:
        """Of an F of at least ``ratio`` without a true deviation."""
        return f_probability(self.ratio, self.between, self.within)


def block_error(values: Sequence[float]) -> tuple[float, float]:
    """Standard error of the median over a run's blocks, from the noise within the run.

    Neighbouring blocks are correlated, so stretches of sqrt(n) blocks are resampled (circular block bootstrap, Politis
    and Romano 1992). The error is corrected for the small number of stretches, as a sample's standard deviation is.

    Args:
        values: the values of the n blocks in time order.

    Returns:
        The standard error, and its degrees of freedom; (nan, 0) if there are too few blocks.
    """
    count = len(values)
    length = math.ceil(math.sqrt(count))  # scipy.stats.bootstrap resamples single values, as if they were independent
    if not count or count / length - 1 < FEWEST_FREEDOM:
        return math.nan, 0.0
    stretches = count / length
    starts = np.random.default_rng(SEED).integers(count, size=(BLOCK_DRAWS, math.ceil(stretches), 1))
    chosen = ((starts + np.arange(length)) % count).reshape(BLOCK_DRAWS, -1)[:, :count]
    medians = np.median(np.asarray(values)[chosen], axis=1)
    return float(medians.std() * math.sqrt(stretches / (stretches - 1))), stretches - 1


def difference(first: Estimate | None, second: Estimate | None) -> Estimate | None:
    """``second`` - ``first`` of two independent estimates (Welch 1947); None if the noise of one is not known."""
    # scipy.stats.ttest_ind compares two samples; here each side can be a sum of means.
    if not (first and second):
        return None
    error = math.hypot(first.error, second.error)
    freedom = error**4 / (first.error**4 / first.freedom + second.error**4 / second.freedom)
    return Estimate(second.value - first.value, error, freedom)


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
