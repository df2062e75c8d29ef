"""Pure arithmetic before anything starts: batches, steps, dropped images, learning rate by epoch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cifar_exp.config.schema import Config
from cifar_exp.errors import ConfigError
from cifar_exp.training.schedules import Schedule, learning_rates

REFERENCE_BATCH = 256  # images of global batch that `optimizer.lr` is stated for
WARMUP_EPOCHS = 5  # of train.lr_scaling=linear_warmup
MOST_STEPS = 10**7  # of a run: the rate of each is known beforehand


@dataclass(frozen=True)
class Plan:
    """What one run will do.

    Attributes:
        world_size: number of ranks.
        per_device_batch_size: images a rank and micro-batch.
        accumulate: micro-batches a rank and step.
        global_batch_size: images a step over all ranks.
        epochs: passes over the training set.
        steps_per_epoch: whole global batches in the training set.
        dropped_images: training images an epoch leaves out, the last partial batch.
        learning_rates: one for each step of the run.
        image_scales: side of the training images in each epoch, as a share of their own; whatever is evaluated has the
            last epoch's, since a network knows objects at the size that it last saw them.
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

    def learning_rate_ranges(self) -> list[tuple[int, int, float, float]]:
        """Epochs with the same rates: (first epoch, last epoch, lowest rate, highest rate), epochs from 1."""
        ranges: list[tuple[int, int, float, float]] = []
        for epoch in range(1, self.epochs + 1):
            rates = self.learning_rates[(epoch - 1) * self.steps_per_epoch : epoch * self.steps_per_epoch]
            low, high = min(rates), max(rates)
            if ranges and ranges[-1][2:] == (low, high):
                ranges[-1] = (ranges[-1][0], epoch, low, high)
            else:
                ranges.append((epoch, epoch, low, high))
        return ranges


def check_scaling(config: Config, world_size: int) -> None:
    """Refuse a global batch that its ranks cannot share evenly, or whose parts cannot be normalised together.

    Raises:
        ConfigError: under strong scaling, where ``train.batch_size`` is not divisible by the number of ranks; where
            batch norms are to see the whole batch and it comes in micro-batches.
    """
    batch_size, parts = config.train.batch_size, world_size * config.train.accumulate
    if config.train.batch_norm == "synchronized" and config.train.accumulate > 1:
        raise ConfigError(
            f"train.batch_norm=synchronized: a rank's micro-batches come one after the other, and train.accumulate="
            f"{config.train.accumulate} makes several. Type train.accumulate=1, or train.batch_norm=averaged"
        )
    if config.train.scaling == "strong" and batch_size % parts:
        nearest = max(parts, round(batch_size / parts) * parts)
        raise ConfigError(
            f"train.batch_size={batch_size}: under train.scaling=strong it is shared by {_sharers(config, world_size)} "
            f"and must be divisible by {parts}. Type train.batch_size={nearest}"
        )


def _sharers(config: Config, world_size: int) -> str:
    accumulate = config.train.accumulate
    return f"{world_size} devices" + (f" x {accumulate} micro-batches" if accumulate > 1 else "")


def make_plan(
    config: Config, world_size: int, train_count: int, schedule: Schedule, resumed_batch: int | None = None
) -> Plan:
    """The plan for ``world_size`` ranks and ``train_count`` training images, those kept apart not among them.

    Under weak scaling ``train.batch_size`` is a device's, under strong scaling it is the global batch; with
    ``train.accumulate`` each device stands for as many, one after the other. The learning
    rate follows the global batch by ``train.lr_scaling``: see :func:`scaled_rates`. A run that goes on from a
    checkpoint keeps that one's global batch, ``resumed_batch``, whatever the number of ranks.

    Raises:
        ConfigError: where the batch is larger than the training set or not divisible by the ranks.
    """
    batch_size, parts = config.train.batch_size, world_size * config.train.accumulate
    if resumed_batch is not None and resumed_batch % parts:
        raise ConfigError(
            f"devices.count={world_size}: the checkpoint was trained with {resumed_batch} images a step, which "
            f"{_sharers(config, world_size)} cannot share evenly. Type a device count that divides {resumed_batch}"
        )
    if resumed_batch is None:
        check_scaling(config, world_size)
    global_batch = batch_size * parts if config.train.scaling == "weak" else batch_size
    global_batch = resumed_batch or global_batch
    if global_batch > train_count:
        share = train_count // parts
        fits = share * parts if config.train.scaling == "strong" else share
        advice = f"train.batch_size={fits} or less" if share else f"devices.count={train_count} or less"
        rest = ""
        if config.validation:
            rest = f" without those of data.validation={config.validation}"
            advice += ", or a smaller data.validation"
        raise ConfigError(
            f"train.batch_size={batch_size}: a step takes {global_batch} images on {world_size} device(s), but the "
            f"training set has {train_count}{rest}. Type {advice}"
        )
    steps_per_epoch = train_count // global_batch
    if (steps := steps_per_epoch * config.train.epochs) > MOST_STEPS:
        raise ConfigError(
            f"train.epochs={config.train.epochs}: they are {steps:,} steps, and a run has {MOST_STEPS:,} at most. Type "
            f"train.epochs={MOST_STEPS // steps_per_epoch} or less"
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


def doubts(config: Config, plan: Plan) -> list[str]:
    """What can be done as configured and is hardly meant, a sentence each."""
    found = []
    if config.early_stopping.patience and not config.validation:
        found.append(
            f"early_stopping.patience={config.early_stopping.patience}: no training images are kept apart, so the test "
            f"set decides when training ends, and its accuracy is then chosen: it reads higher than that of new "
            f"images. Type data.validation=0.1"
        )
    warms_up = config.train.lr_scaling == "linear_warmup" and plan.global_batch_size > REFERENCE_BATCH
    if warms_up and plan.epochs <= WARMUP_EPOCHS:
        found.append(
            f"train.lr_scaling=linear_warmup: the rate rises over {WARMUP_EPOCHS} epochs, and train.epochs="
            f"{plan.epochs} ends before it is the linear rule's. Type train.epochs={2 * WARMUP_EPOCHS} or more"
        )
    return found


def scaled_rates(rule: str, rates: Sequence[float], global_batch: int, steps_per_epoch: int) -> tuple[float, ...]:
    """The learning rates of a global batch by the rule of ``train.lr_scaling``:

    - ``linear``: x batch / 256, as in the reference example.
    - ``sqrt``: x sqrt(batch / 256), which keeps the variance of the update (Krizhevsky 2014, arXiv:1404.5997).
    - ``none``: the same for every batch.
    - ``linear_warmup``: linear, but rising to that from x 1 by equal amounts a step over the first 5 epochs (Goyal et
      al. 2017, arXiv:1706.02677, "gradual warmup"). A batch of up to 256 images needs none.

    Args:
        rule: which one.
        rates: of each step, for a global batch of 256 images.
        global_batch: images a step over all ranks.
        steps_per_epoch: what the warm-up is counted in.
    """
    ratio = global_batch / REFERENCE_BATCH
    if rule == "linear_warmup" and ratio > 1:
        warmup = WARMUP_EPOCHS * steps_per_epoch
        return tuple(rate * (1 + (ratio - 1) * min(1, step / warmup)) for step, rate in enumerate(rates))
    factor = {"sqrt": math.sqrt(ratio), "none": 1.0}.get(rule, ratio)
    return tuple(rate * factor for rate in rates)


def spread(values: Sequence[float], epochs: int) -> tuple[float, ...]:
    """One value an epoch, in order, each for as many epochs as the others (to within one); the last is reached."""
    return tuple(values[-(-(epoch + 1) * len(values) // epochs) - 1] for epoch in range(epochs))
