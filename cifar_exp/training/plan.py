"""Batch sizes, steps, dropped images and learning rates of a run, computed before the ranks start."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cifar_exp.config.schema import Config
from cifar_exp.errors import ConfigError
from cifar_exp.training.schedules import Schedule, learning_rates

REFERENCE_BATCH = 256  # images: the global batch size that `optimizer.lr` refers to
WARMUP_EPOCHS = 5  # under train.lr_scaling=linear_warmup
MOST_STEPS = 10**7  # in a run: the learning rate of each is stored


@dataclass(frozen=True)
class Plan:
    """What one run will do.

    Attributes:
        world_size: number of ranks.
        per_device_batch_size: images per rank and micro-batch.
        accumulate: micro-batches per rank and step.
        global_batch_size: images per step over all ranks.
        epochs: passes over the training set.
        steps_per_epoch: whole global batches in the training set.
        dropped_images: training images in the last, partial batch, which an epoch drops.
        learning_rates: one for each step of the run.
        image_scales: side of the training images in each epoch, as a share of their own. Evaluation uses the last
            epoch's scale, the size at which the network last saw objects.
    """

    world_size: int
    per_device_batch_size: int
    accumulate: int
    global_batch_size: int
    epochs: int
    steps_per_epoch: int
    dropped_images: int
    learning_rates: tuple[float, ...]
    image_scales: tuple[float, ...]

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def learning_rate_ranges(self) -> list[tuple[int, int, tuple[float, ...]]]:
        """Groups of epochs with equal learning rates: (first epoch, last epoch, rates), epochs from 1.

        The rates are those of the first and last step. The lowest and the highest rate are between them, in the order
        of their steps, if they lie outside that range. A constant rate is listed once.
        """
        ranges: list[tuple[int, int, tuple[float, ...]]] = []
        for epoch in range(1, self.epochs + 1):
            rates = self.learning_rates[(epoch - 1) * self.steps_per_epoch : epoch * self.steps_per_epoch]
            turns = _turns(rates)
            if ranges and ranges[-1][2] == turns:
                ranges[-1] = (ranges[-1][0], epoch, turns)
            else:
                ranges.append((epoch, epoch, turns))
        return ranges


def shared_by(plan: Plan, world_size: int) -> Plan:
    """The same plan on fewer ranks: the global batch is kept, if possible through more micro-batches per rank.

    Raises:
        ConfigError: the ranks cannot share the global batch evenly.
    """
    if world_size == plan.world_size:
        return plan
    if plan.global_batch_size % world_size:
        raise ConfigError(
            f"devices.count={world_size}: {plan.global_batch_size} images per step cannot be shared evenly by so many "
            f"ranks. Set launcher.hosts to one number"
        )
    share = plan.global_batch_size // world_size
    accumulate = share // plan.per_device_batch_size if share % plan.per_device_batch_size == 0 else plan.accumulate
    if share % accumulate:
        accumulate = 1
    return replace(plan, world_size=world_size, per_device_batch_size=share // accumulate, accumulate=accumulate)


def _turns(rates: Sequence[float]) -> tuple[float, ...]:
    """The first rate, the extremes in order, the last rate; equal neighbours are listed once."""
    places = sorted({0, rates.index(min(rates)), rates.index(max(rates)), len(rates) - 1})
    values = [rates[place] for place in places]
    return tuple(value for place, value in enumerate(values) if not place or value != values[place - 1])


def check_scaling(config: Config, world_size: int) -> None:
    """Check that the ranks can share the global batch evenly, and that synchronized batch norms can see all of it.

    Raises:
        ConfigError: under strong scaling, ``train.batch_size`` is not divisible by the number of ranks; or synchronized
            batch norms would need several micro-batches at once.
    """
    batch_size, parts = config.train.batch_size, world_size * config.train.accumulate
    if config.train.batch_norm == "synchronized" and config.train.accumulate > 1:
        raise ConfigError(
            f"train.batch_norm=synchronized: it cannot be combined with gradient accumulation, and train.accumulate="
            f"{config.train.accumulate}. Set train.accumulate=1, or train.batch_norm=averaged"
        )
    if config.train.scaling == "strong" and batch_size % parts:
        nearest = max(parts, round(batch_size / parts) * parts)
        raise ConfigError(
            f"train.batch_size={batch_size}: under train.scaling=strong it is shared by {_sharers(config, world_size)} "
            f"and must be divisible by {parts}. Set train.batch_size={nearest}"
        )


def _sharers(config: Config, world_size: int) -> str:
    accumulate = config.train.accumulate
    return f"{world_size} devices" + (f" x {accumulate} micro-batches" if accumulate > 1 else "")


def make_plan(
    config: Config, world_size: int, train_count: int, schedule: Schedule, resumed_batch: int | None = None
) -> Plan:
    """Plan a run. Its batch size was accepted by :func:`check_scaling`, or comes from the checkpoint.

    Under weak scaling, ``train.batch_size`` is a device's batch; under strong scaling it is the global batch. With
    gradient accumulation, each device processes ``train.accumulate`` micro-batches per step, as that many devices
    would. The learning rate follows the global batch by ``train.lr_scaling``; see :func:`scaled_rates`.

    Args:
        config: the settings.
        world_size: number of ranks.
        train_count: images of the training split.
        schedule: the learning-rate schedule.
        resumed_batch: the global batch of the checkpoint that the run resumes from; it is kept.

    Raises:
        ConfigError: the batch is larger than the training split, the checkpoint's batch is not divisible by the ranks,
            or there are too many steps.
    """
    parts = world_size * config.train.accumulate
    global_batch = _global_batch(config, world_size, resumed_batch)
    assert global_batch % parts == 0
    _check_batch_fits(config, world_size, train_count, global_batch)
    steps_per_epoch = train_count // global_batch
    if (steps := steps_per_epoch * config.train.epochs) > MOST_STEPS:
        raise ConfigError(
            f"train.epochs={config.train.epochs}: that is {steps:,} steps, and a run may have at most {MOST_STEPS:,}. "
            f"Set train.epochs={MOST_STEPS // steps_per_epoch} or less"
        )
    rates = learning_rates(schedule, config.optimizer["lr"], steps_per_epoch, config.train.epochs)
    return Plan(
        world_size=world_size,
        per_device_batch_size=global_batch // parts,
        accumulate=config.train.accumulate,
        global_batch_size=global_batch,
        epochs=config.train.epochs,
        steps_per_epoch=steps_per_epoch,
        dropped_images=train_count - steps_per_epoch * global_batch,
        learning_rates=scaled_rates(config.train.lr_scaling, rates, global_batch, steps_per_epoch),
        image_scales=spread(config.train.image_scales or (1.0,), config.train.epochs),
    )


def _global_batch(config: Config, world_size: int, resumed_batch: int | None) -> int:
    """Images per step over all ranks."""
    parts = world_size * config.train.accumulate
    if resumed_batch is None:
        return config.train.batch_size * (parts if config.train.scaling == "weak" else 1)
    if resumed_batch % parts:
        raise ConfigError(
            f"devices.count={world_size}: the checkpoint was trained with {resumed_batch} images per step, which "
            f"{_sharers(config, world_size)} cannot share evenly. Set a device count that divides {resumed_batch}"
        )
    return resumed_batch


def _check_batch_fits(config: Config, world_size: int, train_count: int, global_batch: int) -> None:
    if global_batch <= train_count:
        return
    parts = world_size * config.train.accumulate
    share = train_count // parts
    fits = share * parts if config.train.scaling == "strong" else share
    advice = f"train.batch_size={fits} or less" if share else f"devices.count={train_count} or less"
    rest = ""
    if config.validation:
        rest = f" without the validation split of data.validation={config.validation}"
        advice += ", or a smaller data.validation"
    raise ConfigError(
        f"train.batch_size={config.train.batch_size}: a step takes {global_batch} images on {world_size} device(s), "
        f"but the training set has {train_count}{rest}. Set {advice}"
    )


def warnings(config: Config, plan: Plan) -> list[str]:
    """Warnings about settings that are valid but probably not intended."""
    found = []
    if config.early_stopping.patience and not config.validation:
        found.append(
            f"early_stopping.patience={config.early_stopping.patience}: there is no validation split, so the test set "
            f"decides when training ends. The test accuracy is then optimistically biased. Set data.validation=0.1"
        )
    warms_up = config.train.lr_scaling == "linear_warmup" and plan.global_batch_size > REFERENCE_BATCH
    if warms_up and plan.epochs <= WARMUP_EPOCHS:
        found.append(
            f"train.lr_scaling=linear_warmup: the learning rate rises over {WARMUP_EPOCHS} epochs, but train.epochs="
            f"{plan.epochs} ends before it reaches the linear rule's. Set train.epochs={2 * WARMUP_EPOCHS} or more"
        )
    return found


def scaled_rates(rule: str, rates: Sequence[float], global_batch: int, steps_per_epoch: int) -> tuple[float, ...]:
    """Scale learning rates to a global batch by the rule of ``train.lr_scaling``:

    - ``linear``: times batch / 256, as in the reference example.
    - ``sqrt``: times sqrt(batch / 256), which keeps the variance of the update (Krizhevsky 2014, arXiv:1404.5997).
    - ``none``: unchanged.
    - ``linear_warmup``: linear, but the factor rises from 1 to batch / 256 in equal steps over the first 5 epochs
      (Goyal et al. 2017, arXiv:1706.02677, "gradual warmup"). A batch of up to 256 images needs no warm-up.

    Args:
        rule: the rule.
        rates: the rate of each step for a global batch of 256 images.
        global_batch: images per step over all ranks.
        steps_per_epoch: steps per epoch, from which the length of the warm-up follows.
    """
    ratio = global_batch / REFERENCE_BATCH
    if rule == "linear_warmup" and ratio > 1:
        warmup = WARMUP_EPOCHS * steps_per_epoch
        return tuple(rate * (1 + (ratio - 1) * min(1, step / warmup)) for step, rate in enumerate(rates))
    factor = {"sqrt": math.sqrt(ratio), "none": 1.0}.get(rule, ratio)
    return tuple(rate * factor for rate in rates)


def spread(values: Sequence[float], epochs: int) -> tuple[float, ...]:
    """Spread values evenly over the epochs, in order. The last epoch has the last value."""
    return tuple(values[-(-(epoch + 1) * len(values) // epochs) - 1] for epoch in range(epochs))
