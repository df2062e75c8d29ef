"""Our training loop against a bare PyTorch loop with the same step and the same batches.

Included on both sides: making the batches (the package's data path, real-valued shifts), forward, backward, update.
Our loop adds loss and accuracy of every step, the learning rate, timers and the check for divergence. On CPUs the bare
loop of the second row has PyTorch's layers instead of fused ones. On a GPU the first bare loop has captured steps (CUDA
graphs), as ours has, and the second one has eager steps.
"""

import tempfile
from pathlib import Path

from bare import bare_epoch, graphed_epoch
from harness import Goal, arguments, compare_all, publish
from workload import (
    BATCH,
    ON_GPU,
    REAL_VALUED_SHIFT,
    alone,
    epoch_of,
    fused_network,
    network,
    random_split,
    train_batches,
    trainer,
    turn_steps,
)


def main() -> None:
    options = arguments(__doc__, pairs=12, steps=turn_steps(10)).parse_args()
    with tempfile.TemporaryDirectory() as folder, alone(Path(folder)) as world:
        batches = train_batches(random_split(BATCH * options.steps), world, REAL_VALUED_SHIFT)
        ours = epoch_of(trainer(world, log_every=options.steps), batches)
        bare = graphed_epoch(*network(), batches) if ON_GPU else bare_epoch(*fused_network(), lambda: batches.epoch(1))
        plain = bare_epoch(*network(), lambda: batches.epoch(1))
        other = "launched one by one" if ON_GPU else "PyTorch's layers"
        arms = {f"ours / bare loop, {options.steps} steps": bare, f"ours / bare loop, {other}": plain}
        goals = dict.fromkeys(arms, Goal("<=", 1.02 if ON_GPU else 1.01))
        publish("overhead", compare_all(ours, arms, options.pairs, goals))


if __name__ == "__main__":
    main()
