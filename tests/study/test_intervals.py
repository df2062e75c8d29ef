"""Intervals and tests have textbook values, and the intervals have the nominal coverage."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cifar_exp.study.intervals import Estimate, Interval, Means, adjusted, block_error, difference, f_probability

SAMPLES = [[1.0, 2.0, 3.0], [2.0, 4.0, 9.0], [5.0, 5.5]]


def sum_of(means: Means, *weights: float) -> Estimate:
    found = means.sum(weights)
    assert found
    return found


def test_one_sample_has_students_interval() -> None:
    """Mean 2, standard deviation 1 of three: 2 +- 4.303 / sqrt(3)."""
    interval = sum_of(Means.of([[1.0, 2.0, 3.0]]), 1).interval()
    assert (interval.low, interval.high) == pytest.approx(
        (2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), rel=1e-4
    )


def test_each_sample_has_its_own_spread() -> None:
    """Variances of the means 1/3, 13/3 and 1/16."""
    means = Means.of(SAMPLES)
    assert means.values == pytest.approx([2, 5, 5.25])
    assert means.errors**2 == pytest.approx([1 / 3, 13 / 3, 1 / 16])
    assert list(means.freedoms) == [2, 2, 1]
    both = sum_of(means, -1, 1, 0)
    assert (both.value, both.error) == pytest.approx((3, math.sqrt(14 / 3)))
    assert both.freedom == pytest.approx((14 / 3) ** 2 / ((1 / 3) ** 2 / 2 + (13 / 3) ** 2 / 2))


def test_unknown_noise_gives_no_estimate() -> None:
    """Single runs; too few blocks for one degree of freedom; repeats that do not differ."""
    means = Means.of([[1.0], [2.0, 3.0], [4.0, 4.0]])
    assert means.sum([1, 0, 0]) is None
    assert means.sum([-1, 1, 0]) is None
    assert means.sum([0, 0, 1]) is None
    assert sum_of(means, 0, 1, 0).value == 2.5
    assert sum_of(means, 0, 1, -1).value == -1.5
    assert Means(np.array([1.0]), np.array([0.1]), np.array([2 / 3])).sum([1]) is None
    assert Means(np.array([1.0]), np.array([0.1]), np.array([3.0])).sum([math.nan]) is None


@given(
    samples=st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), min_size=1, max_size=4),
    weights=st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4),
)
def test_interval_contains_its_estimate_and_is_finite(samples: list[list[float]], weights: list[float]) -> None:
    found = Means.of(samples).sum(weights[: len(samples)])
    if found:
        interval = found.interval()
        assert -math.inf < interval.low < found.value < interval.high < math.inf
        assert 0 <= found.probability() <= 1


def test_several_contrasts_are_welchs_analysis_of_variance() -> None:
    samples = [[10.1, 10.4, 9.9, 10.0], [10.9, 11.4, 12.1], [9.0, 12.0, 11.0, 13.0, 10.5]]
    means = Means.of(samples)
    contrasts = np.array([[-1.0, 1, 0], [-1, 0, 1]])
    test = means.deviation(contrasts, contrasts @ means.values)
    assert test
    weights = 1 / means.errors**2
    grand = weights @ means.values / weights.sum()
    off = ((1 - weights / weights.sum()) ** 2 / means.freedoms).sum()  # Welch 1951
    assert test.ratio == pytest.approx((weights * (means.values - grand) ** 2).sum() / 2 / (1 + 2 * off / 8))
    assert (test.between, test.within) == (2, pytest.approx(8 / (3 * off)))
    assert test.probability == pytest.approx(stats.f.sf(test.ratio, 2, test.within))


def test_one_contrast_is_welchs_t_test() -> None:
    means = Means.of(SAMPLES)
    test = means.deviation(np.array([[-1.0, 1, 0]]), [3.0])
    both = sum_of(means, -1, 1, 0)
    assert test
    assert (math.sqrt(test.ratio), test.within) == pytest.approx((3 / both.error, both.freedom))
    assert test.probability == pytest.approx(both.probability())
    assert Means.of([[1.0], [2.0, 3.0]]).deviation(np.array([[-1.0, 1]]), [1.5]) is None
    assert Means.of([[2.0, 2.0], [3.0, 3.0]]).deviation(np.array([[-1.0, 1]]), [1.0]) is None


def test_error_of_a_median_grows_with_autocorrelation() -> None:
    """Independent blocks: 1.25 sigma / sqrt(n). Correlated blocks contain less information."""
    rng = np.random.default_rng(1)
    errors = [block_error(list(rng.standard_normal(100)))[0] for _ in range(40)]
    assert np.mean(errors) == pytest.approx(1.2533 / 10, rel=0.2)
    lasting = [block_error(list(np.repeat(rng.standard_normal(10), 10)))[0] for _ in range(40)]
    assert np.mean(lasting) > 2 * np.mean(errors)


def test_few_blocks_give_no_interval() -> None:
    """Five blocks are 5/3 stretches: less than one degree of freedom."""
    for values in ([], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0, 5.0]):
        error, freedom = block_error(values)
        assert (math.isnan(error), freedom) == (True, 0)
    assert block_error([2.0] * 16) == (0.0, 3.0)


def test_differences_are_those_of_welchs_test() -> None:
    first, second = [10.1, 10.4, 9.9], [10.9, 11.4, 12.1, 11.0]
    found = difference(Means.of([first]).sum([1]), Means.of([second]).sum([1]))
    reference = stats.ttest_ind(second, first, equal_var=False)
    ends = reference.confidence_interval(0.95)
    assert found
    assert found.probability() == pytest.approx(reference.pvalue)
    assert (found.interval().low, found.interval().high) == pytest.approx((ends.low, ends.high))
    assert difference(None, Means.of([second]).sum([1])) is None


def test_probability_of_an_f_is_scipys() -> None:
    assert f_probability(3.0, 2, 5) == pytest.approx(stats.f.sf(3.0, 2, 5))


def test_holms_correction() -> None:
    assert adjusted([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjusted([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert adjusted([]) == []


def test_intervals_map_through_monotonic_functions() -> None:
    assert Interval(1, 2).mapped(lambda value: 1 / value) == Interval(0.5, 1)
    assert Interval(1, 2).around(3) == Interval(1, 3)
