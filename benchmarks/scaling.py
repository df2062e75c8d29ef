"""What a second rank costs and buys on one machine's cores, without data or start-up in the way.

(a) two ranks of one thread, 256 images each, against two processes that know nothing of each other: what averaging
    gradients costs. (b) the same global batch of 256 on two ranks of one thread and on one rank of two threads.
(c) our loop under DDP against a bare DDP loop (DistributedDataParallel as it comes) on the same batches.
Processes stay alive between turns; each makes its own batches (the package's data path, whole-pixel shifts).
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from bare import bare_epoch
from harness import Goal, arguments, compare, compare_all, publish
from processes import ProcessArm
from torch.nn.parallel import DistributedDataParallel
from workload import BATCH, alone, epoch_of, network, random_split, train_batches, trainer

from cifar_exp.distributed import joined_world

RANKS = 2


def main() -> None:
    options = arguments(__doc__, pairs=8, steps=6).parse_args()
    count, weak = options.steps * BATCH, (options.steps * BATCH * RANKS, BATCH)
    with ExitStack() as stack:
        ddp = stack.enter_context(ProcessArm(our_ranks, *weak, ranks=RANKS, threads=1))
        others = {
            "(a) two ranks / two independent processes": stack.enter_context(
                ProcessArm(our_only_rank, count, ranks=RANKS, threads=1, independent=True)
            ),
            "(c) our two ranks / two bare DDP ranks": stack.enter_context(
                ProcessArm(bare_ranks, *weak, ranks=RANKS, threads=1)
            ),
        }
        goals = dict(zip(others, (Goal("<=", 1 / 0.97), Goal("<=", 1.0)), strict=True))
        rows = compare_all(ddp, others, options.pairs, goals)
    with ExitStack() as stack:
        processes = stack.enter_context(ProcessArm(our_ranks, count, BATCH // RANKS, ranks=RANKS, threads=1))
        threads = stack.enter_context(ProcessArm(our_only_rank, count, threads=RANKS))
        rows.append(compare("(b) 2 ranks x 1 thread / 1 rank x 2 threads", processes, threads, options.pairs))
    images = {row.name: count if row.name.startswith("(b)") else weak[0] for row in rows}
    rates = {row.name: [round(images[row.name] / seconds) for seconds in row.seconds] for row in rows}
    publish("scaling", rows, {"images/s of each": rates})


def our_ranks(turns: Iterator[None], folder: str, images: int, batch: int) -> None:
    """Our loop under DDP: ``images`` a turn over all ranks."""
    with joined_world("cpu", Path(folder), 600) as world:
        epoch = epoch_of(trainer(world), train_batches(random_split(images), world, batch=batch))
        for _ in turns:
            epoch()


def our_only_rank(turns: Iterator[None], _folder: str, images: int) -> None:
    """Our loop without DDP, in a world of its own."""
    with tempfile.TemporaryDirectory() as folder, alone(Path(folder)) as world:
        epoch = epoch_of(trainer(world), train_batches(random_split(images), world))
        for _ in turns:
            epoch()


def bare_ranks(turns: Iterator[None], folder: str, images: int, batch: int) -> None:
    """A plain DDP script: gloo, DistributedDataParallel with its defaults."""
    with joined_world("cpu", Path(folder), 600) as world:
        model, optimizer = network()
        parallel = DistributedDataParallel(model)
        batches = train_batches(random_split(images), world, batch=batch)
        epoch = bare_epoch(parallel, optimizer, lambda: batches.epoch(1))
        for _ in turns:
            epoch()


if __name__ == "__main__":
    main()
