"""Our training loop against a bare PyTorch loop that does the same step on the same batches.

Included on both sides: making the batches (the package's data path, real-valued shifts), forward, backward, update.
Ours adds what the package adds: loss and accuracy of every step, the learning rate, clocks, the check for divergence.
The second row's bare loop has PyTorch's own layers in place of the fused ones.
"""

import tempfile
from pathlib import Path

from bare import bare_epoch
from harness import Goal, arguments, compare_all, publish
from workload import BATCH, alone, epoch_of, fused_network, network, random_split, train_batches, trainer

from cifar_exp.augment import Shift


def main() -> None:
    options = arguments(__doc__, pairs=12, steps=10).parse_args()
    with tempfile.TemporaryDirectory() as folder, alone(Path(folder)) as world:
        batches = train_batches(random_split(BATCH * options.steps), world, Shift())
        ours = epoch_of(trainer(world, log_every=options.steps), batches)
        bare = bare_epoch(*fused_network(), lambda: batches.epoch(1))
        plain = bare_epoch(*network(), lambda: batches.epoch(1))
        arms = {f"ours / bare loop, {options.steps} steps": bare, "ours / bare loop, PyTorch's layers": plain}
        goals = {name: Goal("<=", 1.01) for name in arms}
        publish("overhead", compare_all(ours, arms, options.pairs, goals))


if __name__ == "__main__":
    main()
