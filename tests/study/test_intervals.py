"""Intervals and tests have the values of textbooks, and hold the truth as often as they say."""

import math

import numpy as np
import pytest
from scipy import stats

from cifar_exp.study.intervals import (
    Interval,
    Means,
    adjusted,
    block_error,
    difference,
    f_probability,
    percentile_interval,
)

SAMPLES = [[1.0, 2.0, 3.0], [2.0, 4.0, 9.0], [5.0, 5.5]]


def test_one_sample_has_students_interval() -> None:
    """Mean 2, standard deviation 1 of three: 2 +- 4.303 / sqrt(3)."""
    interval = Means.of([[1.0, 2.0, 3.0]]).interval([1])
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx(
        (2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), rel=1e-4
    )


def test_samples_share_their_spread() -> None:
    """Squares 2 + 26 + 0.125 over 2 + 2 + 1 degrees of freedom; t with 5 reaches 2.571 errors."""
    means = Means.of(SAMPLES)
    spread = math.sqrt(28.125 / 5)
    assert means.freedom == 5
    assert means.values == pytest.approx([2, 5, 5.25])
    assert means.errors == pytest.approx([spread / math.sqrt(3), spread / math.sqrt(3), spread / math.sqrt(2)])
    interval = means.interval([-1, 1, 0])
    reach = 2.5706 * spread * math.sqrt(2 / 3)
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((3 - reach, 3 + reach), rel=1e-4)


def test_single_values_have_no_interval() -> None:
    assert Means.of([[1.0], [2.0]]).interval([0, 1]) is None


def test_percentiles_of_the_draws_are_the_ends_of_the_t_interval() -> None:
    means = Means.of(SAMPLES)
    exact, drawn = means.interval([-1, 0, 1]), percentile_interval(means.draws() @ np.array([-1, 0, 1]))
    assert exact is not None
    assert (drawn.low, drawn.high) == pytest.approx((exact.low, exact.high), abs=0.06 * (exact.high - exact.low))
    assert (means.draws() == means.draws()).all()


def test_the_error_of_a_median_grows_where_neighbours_are_alike() -> None:
    """Independent blocks: 1.25 sigma / sqrt(n). Noise that lasts for many blocks tells less than as many blocks."""
    rng = np.random.default_rng(1)
    errors = [block_error(list(rng.standard_normal(100)))[0] for _ in range(40)]
    assert np.mean(errors) == pytest.approx(1.2533 / 10, rel=0.2)
    lasting = [block_error(list(np.repeat(rng.standard_normal(10), 10)))[0] for _ in range(40)]
    assert np.mean(lasting) > 2 * np.mean(errors)


def test_few_blocks_tell_nothing_and_equal_ones_are_sure() -> None:
    error, freedom = block_error([1.0, 2.0, 3.0])
    assert (math.isnan(error), freedom) == (True, 0)
    assert block_error([2.0] * 16) == (0.0, 3.0)


def test_differences_are_those_of_welchs_test() -> None:
    first, second = [10.1, 10.4, 9.9], [10.9, 11.4, 12.1, 11.0]
    interval, probability = difference(Means.of([first]), Means.of([second]), ([1], [1]))
    reference = stats.ttest_ind(second, first, equal_var=False)
    ends = reference.confidence_interval(0.95)
    assert interval is not None
    assert probability == pytest.approx(reference.pvalue)
    assert (interval.low, interval.high) == pytest.approx((ends.low, ends.high))
    assert difference(Means.of([[1.0]]), Means.of([second]), ([1], [1])) == (None, None)


def test_probability_of_an_f_is_scipys() -> None:
    assert f_probability(3.0, 2, 5) == pytest.approx(stats.f.sf(3.0, 2, 5))


def test_holms_correction() -> None:
    assert adjusted([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjusted([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert adjusted([]) == []


def test_intervals_map_through_what_rises_and_what_falls() -> None:
    assert Interval(1, 2).mapped(lambda value: 1 / value) == Interval(0.5, 1)
    assert Interval(1, 2).around(3) == Interval(1, 3)
