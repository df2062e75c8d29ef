"""Our training loop against a bare PyTorch loop that does the same step on the same batches.

Included on both sides: making the batches (the package's data path, real-valued shifts), forward, backward, update.
Ours adds what the package adds: loss and accuracy of every step, the learning rate, clocks, the check for divergence.
"""

import tempfile
from pathlib import Path

from bare import bare_epoch
from harness import Goal, arguments, compare, publish
from workload import BATCH, alone, epoch_of, network, random_split, train_batches, trainer

from cifar_exp.augment import Shift


def main() -> None:
    options = arguments(__doc__, pairs=12, steps=10).parse_args()
    with tempfile.TemporaryDirectory() as folder, alone(Path(folder)) as world:
        batches = train_batches(random_split(BATCH * options.steps), world, Shift())
        ours = epoch_of(trainer(world, log_every=options.steps), batches)
        bare = bare_epoch(*network(), lambda: batches.epoch(1))
        publish(
            "overhead",
            [compare(f"ours / bare loop, {options.steps} steps", ours, bare, options.pairs, Goal("<=", 1.01))],
        )


if __name__ == "__main__":
    main()
