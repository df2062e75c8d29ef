"""The plan of a run: steps, dropped images and the learning rate of every epoch."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from cifar_exp.config.schema import Config
from cifar_exp.errors import ConfigError
from cifar_exp.training.plan import Plan, check_scaling, make_plan, warnings
from cifar_exp.training.schedules import cosine, piecewise
from tests.helpers.configs import default_config

REFERENCE = partial(piecewise, drop_factor=0.1, drop_period=50)


def plan(
    devices: int, count: int = 50_000, *, lr: float = 0.1, schedule: Any = REFERENCE, apart: float = 0.0, **train: Any
) -> Plan:
    config = configured(lr=lr, apart=apart, **train)
    check_scaling(config, devices)
    return make_plan(config, devices, count, schedule)


def configured(*, lr: float = 0.1, apart: float = 0.0, patience: int = 0, **train: Any) -> Config:
    default = default_config()
    return replace(
        default,
        data=default.data | {"validation": apart},
        optimizer=default.optimizer | {"lr": lr},
        early_stopping=replace(default.early_stopping, patience=patience or None),
        train=replace(default.train, **train),
    )


@pytest.mark.parametrize(("devices", "steps", "dropped"), [(1, 195, 80), (2, 97, 336), (4, 48, 848)])
def test_the_references_steps_on_1_2_and_4_devices(devices: int, steps: int, dropped: int) -> None:
    made = plan(devices)
    assert (made.steps_per_epoch, made.dropped_images) == (steps, dropped)
    assert (made.world_size, made.per_device_batch_size, made.global_batch_size) == (devices, 256, 256 * devices)
    assert (made.epochs, made.steps) == (60, 60 * steps)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_the_references_learning_rate_of_every_epoch(devices: int) -> None:
    made = plan(devices)
    assert len(made.learning_rates) == made.steps
    for epoch in range(60):
        rates = made.learning_rates[epoch * made.steps_per_epoch : (epoch + 1) * made.steps_per_epoch]
        expected = 0.1 * devices * 0.1 ** (epoch // 50)
        assert rates == pytest.approx([expected] * made.steps_per_epoch, rel=1e-12)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_strong_scaling_keeps_the_global_batch_the_steps_and_the_rate(devices: int) -> None:
    made = plan(devices, scaling="strong")
    assert (made.per_device_batch_size, made.global_batch_size) == (256 // devices, 256)
    assert (made.steps_per_epoch, made.dropped_images) == (195, 80)
    assert made.learning_rates == plan(1).learning_rates


@pytest.mark.parametrize("scaling", ["weak", "strong"])
def test_accumulation_has_the_plan_of_as_many_devices(scaling: str) -> None:
    one, several = plan(2, accumulate=4, scaling=scaling), plan(8, scaling=scaling)
    for name in ("per_device_batch_size", "global_batch_size", "steps_per_epoch", "dropped_images", "learning_rates"):
        assert getattr(one, name) == getattr(several, name), name
    assert (one.world_size, one.accumulate) == (2, 4)


def test_impossible_micro_batches_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"2 devices x 3 micro-batches and must be divisible by 6\. Set .*=258"):
        plan(2, accumulate=3, scaling="strong")


def test_the_rate_grows_with_the_batch_and_not_with_the_devices() -> None:
    """It is stated for 256 images: 512 on one device have the rate of 2 x 256."""
    assert plan(1, batch_size=512).learning_rates == plan(2).learning_rates
    assert plan(1, batch_size=64, lr=0.2).learning_rates[0] == pytest.approx(0.05)


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0), ("none", 1.0)])
def test_rules_of_the_learning_rate_on_four_devices(rule: str, factor: float) -> None:
    """Four times the global batch: four times the rate, twice, or the same; the schedule's drop stays."""
    made = plan(4, epochs=60, lr_scaling=rule)
    assert made.learning_rates[0] == pytest.approx(0.1 * factor)
    assert made.learning_rates[-1] == pytest.approx(0.01 * factor)
    assert plan(1, lr_scaling=rule).learning_rates == pytest.approx(plan(1).learning_rates)
    assert plan(4, scaling="strong", lr_scaling=rule).learning_rates == pytest.approx(plan(1).learning_rates)


def test_linear_warm_up_rises_by_equal_amounts_over_five_epochs() -> None:
    """Goyal et al. 2017: from the rate of one device by a constant amount each iteration to k times that."""
    made = plan(
        4,
        4 * 256 * 10,
        epochs=8,
        lr_scaling="linear_warmup",
        schedule=partial(piecewise, drop_factor=0.1, drop_period=7),
    )
    assert made.steps_per_epoch == 10
    assert made.learning_rates[:51] == pytest.approx([0.1 + 0.3 * step / 50 for step in range(51)])
    assert made.learning_rates[51:70] == pytest.approx([0.4] * 19)
    assert made.learning_rates[70:] == pytest.approx([0.04] * 10)
    small = plan(1, batch_size=128, lr_scaling="linear_warmup")
    assert small.learning_rates == plan(1, batch_size=128).learning_rates  # nothing to warm up to


def test_doubtful_settings_are_warned_about() -> None:
    """A warm-up longer than the run; early stopping on the test set."""
    config = configured(lr_scaling="linear_warmup")
    (warning,) = warnings(config, plan(2, epochs=5))
    assert "train.epochs=5 ends before" in warning
    assert warnings(config, plan(1, epochs=5)) == warnings(config, plan(2, epochs=6)) == []
    (warning,) = warnings(configured(patience=2), plan(1))
    assert "early_stopping.patience=2: there is no validation split" in warning
    assert warnings(configured(patience=2, apart=0.1), plan(1)) == []


def test_nothing_is_dropped_where_the_batch_divides_the_set() -> None:
    made = plan(2, 96, batch_size=16, epochs=1)
    assert (made.steps_per_epoch, made.dropped_images) == (3, 0)


def test_batch_as_large_as_the_training_set_is_one_step() -> None:
    made = plan(2, 97, batch_size=48, epochs=1)
    assert (made.steps_per_epoch, made.dropped_images) == (1, 1)


REFUSED = {
    "weak, too large": ((4, 100, {"batch_size": 64}), ("train.batch_size=64", "256 images on 4", "100"), 25),
    "strong, too large": (
        (2, 97, {"batch_size": 100, "scaling": "strong"}),
        ("train.batch_size=100", "100 images on 2", "97"),
        96,
    ),
    "indivisible": (
        (4, 50_000, {"batch_size": 255, "scaling": "strong"}),
        ("train.batch_size=255", "train.scaling=strong", "divisible by 4"),
        256,
    ),
    "fewer images than ranks": (
        (4, 50_000, {"batch_size": 1, "scaling": "strong"}),
        ("train.batch_size=1:", "divisible by 4"),
        4,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_batch_size_is_refused_with_a_valid_one(case: str) -> None:
    """The message names setting, value and rule, and its remedy is accepted."""
    (devices, count, train), parts, valid = REFUSED[case]
    with pytest.raises(ConfigError) as refusal:
        plan(devices, count, **train)
    for part in (*parts, f"Set train.batch_size={valid}"):
        assert part in str(refusal.value)
    assert plan(devices, count, **train | {"batch_size": valid}).steps_per_epoch >= 1


def test_validation_split_that_leaves_too_few_images_is_refused() -> None:
    with pytest.raises(ConfigError) as refusal:
        plan(2, 40, batch_size=32, apart=0.6)
    for part in (
        "train.batch_size=32",
        "has 40 without the validation split of data.validation=0.6",
        "Set train.batch_size=20 or less",
    ):
        assert part in str(refusal.value)


def test_weak_scaling_needs_no_divisible_batch() -> None:
    assert plan(4, batch_size=255).global_batch_size == 1020


def test_learning_rate_ranges_join_the_epochs_of_one_rate() -> None:
    ranges = plan(2).learning_rate_ranges()
    assert [epochs for *epochs, _ in ranges] == [[1, 50], [51, 60]]
    assert [rates for *_, rates in ranges] == [pytest.approx((0.2,)), pytest.approx((0.02,))]


def test_learning_rate_ranges_of_a_rate_that_moves_are_its_ends_in_each_epoch() -> None:
    made = plan(1, 80, batch_size=20, epochs=2, schedule=partial(cosine, warmup_epochs=0), lr=1.0)
    first, second = made.learning_rate_ranges()
    rates = made.learning_rates
    assert len(rates) == 8
    assert first == (1, 1, (rates[0], rates[3]))  # falling, as in time
    assert second == (2, 2, (rates[4], rates[7]))
    assert rates[4] == pytest.approx(rates[0] / 2)


def test_a_rate_that_rises_and_falls_within_an_epoch_shows_its_peak() -> None:
    made = plan(1, 80, batch_size=20, epochs=1, schedule=partial(cosine, warmup_epochs=0.5), lr=1.0)
    (only,) = made.learning_rate_ranges()
    rates = made.learning_rates
    assert only == (1, 1, (rates[0], max(rates), rates[3]))
    assert rates[0] < rates[3] < max(rates)


@pytest.mark.parametrize(
    ("epochs", "given", "expected"),
    [
        (3, (), (1, 1, 1)),
        (4, (0.5, 1), (0.5, 0.5, 1, 1)),
        (4, (0.25, 0.5, 0.75, 1), (0.25, 0.5, 0.75, 1)),
        (5, (0.5, 1), (0.5, 0.5, 1, 1, 1)),
        (2, (0.25, 0.5, 0.75, 1), (0.5, 1)),
    ],
)
def test_image_scales_are_spread_over_the_epochs(
    epochs: int, given: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    assert plan(1, epochs=epochs, image_scales=given).image_scales == expected
