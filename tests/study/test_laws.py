"""The fitted laws recover the serial fraction of a simulated sweep, and warn if they do not fit."""

import math

import numpy as np
import pytest

from benchmarks.interval_coverage import LEAST, SCENARIOS, coverage
from cifar_exp.study.intervals import Means
from cifar_exp.study.laws import Name, fitted, relative_rate

COUNTS = [1, 2, 4, 8]


def measured(law: Name, fraction: float, noise: float = 0.01, counts: list[int] = COUNTS) -> Means:
    """Logarithms of the throughputs that the law predicts, each with two runs that deviate by +- ``noise``."""
    rates = [100 * relative_rate(law, fraction, count) for count in counts]
    return Means.of([[math.log(rate) - noise, math.log(rate) + noise] for rate in rates])


@pytest.mark.parametrize("law", ["Amdahl", "Gustafson"])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.4, 1.0])
def test_a_law_finds_its_own_serial_fraction(law: Name, fraction: float) -> None:
    fit = fitted(law, COUNTS, measured(law, fraction))
    assert fit.serial_fraction == pytest.approx(fraction, abs=1e-9)
    assert fit.interval is not None
    assert fit.interval.low < fraction < fit.interval.high
    assert not [warning for warning in fit.warnings if "noise" in warning]
    assert fit.speedup(4, over=2) == pytest.approx(relative_rate(law, fraction, 4) / relative_rate(law, fraction, 2))


def test_gains_of_doubling_by_hand() -> None:
    """10 % serial: 1 / (0.1 + 0.9 / 8) = 4.706, 1 / (0.1 + 0.9 / 16) = 6.4; and 0.1 + 0.9 n: 7.3, 14.5."""
    amdahl, gustafson = (fitted(law, COUNTS, measured(law, 0.1)) for law in ("Amdahl", "Gustafson"))
    assert amdahl.gain == pytest.approx(6.4 / 4.705882, rel=1e-6)
    assert gustafson.gain == pytest.approx(14.5 / 7.3)
    assert amdahl.gain_interval is not None
    assert amdahl.gain_interval.low < amdahl.gain < amdahl.gain_interval.high < 2
    assert "serial fraction 10.0%" in str(amdahl)
    assert "16 devices instead of 8 would give 1.36" in str(amdahl)


def test_a_fraction_below_zero_predicts_no_end_of_throughput_in_place_of_a_division_by_zero() -> None:
    assert relative_rate("Amdahl", -1.0, 2) == math.inf
    assert relative_rate("Amdahl", -1.0, 4) == math.inf
    assert relative_rate("Amdahl", -0.1, 2) == pytest.approx(1 / 0.45)


def test_the_interval_is_that_of_error_propagation() -> None:
    """Two counts: f = 2 / S - 1, so its error is 2 / S times that of ln S. Two repeats each: t of 2 degrees, 4.303."""
    fit = fitted("Amdahl", [1, 2], measured("Amdahl", 0.1, noise=0.005, counts=[1, 2]))
    speedup = 1 / (0.1 + 0.45)
    spread = 0.005 * math.sqrt(2)  # of two values 0.005 to each side, each count's mean divides it by sqrt(2)
    reach = 4.3027 * 2 / speedup * spread
    assert fit.interval is not None
    assert (fit.interval.high - fit.interval.low) / 2 == pytest.approx(reach, rel=1e-4)


def test_unsupported_law_is_warned_about() -> None:
    two = fitted("Amdahl", [1, 2], measured("Amdahl", 0.1, counts=[1, 2]))
    assert any("only two device counts" in warning for warning in two.warnings)
    broken = Means.of([[math.log(rate) - 0.001, math.log(rate) + 0.001] for rate in (100, 195, 380, 390)])
    assert any(
        "deviates from Amdahl's law by up to" in warning for warning in fitted("Amdahl", COUNTS, broken).warnings
    )
    beyond = fitted("Amdahl", COUNTS, measured("Amdahl", -0.02))
    assert any("lies outside 0 to 1: more than the ideal speedup" in warning for warning in beyond.warnings)
    assert beyond.gain == 2
    slower = Means.of([[math.log(rate)] for rate in (100, 90, 80, 70)])
    fit = fitted("Amdahl", COUNTS, slower)
    assert any("more devices are slower than one" in warning for warning in fit.warnings)
    assert (fit.interval, fit.gain_interval) == (None, None)  # one run each: nothing is known of the noise


@pytest.mark.parametrize("name", ["gustafson, 3 seeds", "only the largest count is noisy"])
def test_intervals_contain_the_truth_in_95_of_100_sweeps(name: str) -> None:
    """A tenth of what ``benchmarks/interval_coverage.py`` counts; its 2,000 sweeps have to reach 93 %."""
    found = coverage(SCENARIOS[name], sweeps=200)
    assert min(found.fraction, found.speedup) > LEAST - 3 * math.sqrt(LEAST * (1 - LEAST) / 200)


def test_bootstrap_of_three_repeats_contains_the_truth_too_rarely() -> None:
    """The reason for not using percentiles of resampled repeats."""
    assert coverage(SCENARIOS["run noise alone"], sweeps=200).naive < 0.9


def test_fits_are_the_same_each_time() -> None:
    log_rates = measured("Amdahl", 0.07)
    assert fitted("Amdahl", COUNTS, log_rates) == fitted("Amdahl", COUNTS, log_rates)
    assert np.isfinite(fitted("Amdahl", COUNTS, log_rates).gain)
