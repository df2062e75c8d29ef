"""Evaluation time per image against training time per image, in the package's loop on one rank.

Included: batches (uint8 images in memory to normalised floats; flips and shifts in training alone), forward, sums of
loss and accuracy; in training also backward and update.
"""

import tempfile
from pathlib import Path

from harness import Goal, arguments, compare, publish
from workload import (
    BATCH,
    PRECISION,
    alone,
    epoch_of,
    evaluation_batches,
    random_split,
    train_batches,
    trainer,
    turn_steps,
)

from cifar_exp.training.evaluation import evaluate


def main() -> None:
    options = arguments(__doc__, pairs=12, steps=turn_steps(10)).parse_args()
    with tempfile.TemporaryDirectory() as folder, alone(Path(folder)) as world:
        split = random_split(BATCH * options.steps)
        loop = trainer(world, log_every=options.steps)
        training = epoch_of(loop, train_batches(split, world))
        test_images = evaluation_batches(split, world)

        def test_pass() -> None:
            evaluate(loop.train_step.model, test_images, PRECISION)

        name = f"test pass / training, {BATCH * options.steps:,} images each"
        publish("evaluation", [compare(name, test_pass, training, options.pairs, Goal("<=", 1 / 3))])


if __name__ == "__main__":
    main()
