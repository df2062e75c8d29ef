"""The cost and benefit of a second rank on the cores of one machine, without reading data or start-up.

(a) Two ranks of one thread, 256 images each, against two independent processes: the cost of gradient averaging.
(b) The same global batch of 256 on two ranks of one thread and on one rank of two threads.
(c) Our loop under DDP against a bare DDP loop (DistributedDataParallel with its defaults) on the same batches, with
    gloo's threads scheduled as ours.
Processes stay alive between turns. Each makes its own batches (the package's data path, whole-pixel shifts).

The loss of (a) is split by cause, as shares of an independent process's time: waiting for the slower rank, exposed
communication, slower computation and data than without DDP, and the rest, which the loop's timers do not cover.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean

from bare import bare_epoch
from harness import Comparison, Figure, Goal, arguments, compare, compare_all, publish
from processes import ProcessArm
from torch.nn.parallel import DistributedDataParallel
from workload import BATCH, alone, epoch_of, network, random_split, train_batches, trainer

from cifar_exp.distributed.process_group import joined_world
from cifar_exp.distributed.rank_times import RankTimes, by_rank
from cifar_exp.training.trainer import Trainer

RANKS = 2
TURNS_FILE = "turns.jsonl"  # one line a turn: seconds of the whole and of its parts, means over the ranks
CAUSES = {
    "waiting": "waiting for the slower rank",
    "communication": "exposed averaging",
    "compute": "computing takes longer, DDP and reads of the loss in it",
    "data": "data takes longer",
}


def main() -> None:
    options = arguments(__doc__, pairs=8, steps=6).parse_args()
    count, weak = options.steps * BATCH, (options.steps * BATCH * RANKS, BATCH)
    with ExitStack() as stack:
        ddp = stack.enter_context(ProcessArm(our_ranks, *weak, ranks=RANKS, threads=1))
        independent = stack.enter_context(ProcessArm(our_only_rank, count, ranks=RANKS, threads=1, independent=True))
        others = {
            "(a) two ranks / two independent processes": independent,
            "(c) our two ranks / two bare DDP ranks": stack.enter_context(
                ProcessArm(bare_ranks, *weak, ranks=RANKS, threads=1)
            ),
        }
        goals = dict(zip(others, (Goal("<=", 1 / 0.97), Goal("<=", 1.0)), strict=True))
        rows: list[Comparison | Figure] = [*compare_all(ddp, others, options.pairs, goals)]
        causes = by_cause(turns_in(ddp), turns_in(independent))
    with ExitStack() as stack:
        processes = stack.enter_context(ProcessArm(our_ranks, count, BATCH // RANKS, ranks=RANKS, threads=1))
        threads = stack.enter_context(ProcessArm(our_only_rank, count, threads=RANKS))
        rows.append(compare("(b) 2 ranks x 1 thread / 1 rank x 2 threads", processes, threads, options.pairs))
    rates = {
        row.name: [round((count if row.name.startswith("(b)") else weak[0]) / seconds) for seconds in row.seconds]
        for row in rows
        if isinstance(row, Comparison)
    }
    publish("scaling", [*rows, *causes], {"images/s of each": rates})


def by_cause(ranks: list[dict[str, float]], alone: list[dict[str, float]]) -> list[Figure]:
    """The loss of two ranks against two independent processes by cause, for each measured turn."""
    losses: dict[str, list[float]] = {name: [] for name in ("(a) lost", *CAUSES.values(), "not accounted for")}
    for ours, theirs in list(zip(ranks, alone, strict=True))[1:]:
        whole = (ours["seconds"] - theirs["seconds"]) / theirs["seconds"]
        parts = {told: (ours[name] - theirs[name]) / theirs["seconds"] for name, told in CAUSES.items()}
        for name, value in {"(a) lost": whole, **parts, "not accounted for": abs(whole - sum(parts.values()))}.items():
            losses[name].append(value)
    goals = {"not accounted for": Goal("<=", 0.02)}  # either way
    names = {name: name if name.startswith("(a)") else f"(a) of it {name}" for name in losses}
    return [Figure.of(names[name], values, goal=goals.get(name)) for name, values in losses.items()]


def turns_in(arm: ProcessArm) -> list[dict[str, float]]:
    """The times of each turn, averaged over the processes of an arm."""
    noted = [[json.loads(line) for line in (folder / TURNS_FILE).read_text().splitlines()] for folder in arm.folders]
    return [{name: fmean(turn[name] for turn in turns) for name in turns[0]} for turns in zip(*noted, strict=True)]


def noted_epoch(loop: Trainer, epoch: Callable[[], None], folder: Path) -> Callable[[], None]:
    """An epoch whose time and split (means over ranks) rank 0 appends to a file."""

    def run() -> None:
        loop.rank_times = RankTimes()
        begin = time.perf_counter()
        epoch()
        seconds = time.perf_counter() - begin
        ranks = by_rank(loop.rank_times.metrics())
        # A single rank does not wait or average, so it writes no such times. With several ranks they must be there.
        untold = {"waiting": 0.0, "communication": 0.0} if len(ranks) == 1 else {}
        parts = {name: fmean((untold | rank)[name] for rank in ranks) for name in CAUSES}
        with (folder / TURNS_FILE).open("a") as file:
            file.write(json.dumps({"seconds": seconds, **parts}) + "\n")

    return run


def our_ranks(turns: Iterator[None], folder: str, images: int, batch: int) -> None:
    """Our loop under DDP: ``images`` per turn over all ranks."""
    with joined_world("cpu", Path(folder), 600) as world:
        loop = trainer(world)
        epoch = epoch_of(loop, train_batches(random_split(images), world, batch=batch))
        if world.is_first:
            epoch = noted_epoch(loop, epoch, Path(folder))
        for _ in turns:
            epoch()


def our_only_rank(turns: Iterator[None], folder: str, images: int) -> None:
    """Our loop without DDP, as rank 0 of 1."""
    with tempfile.TemporaryDirectory() as meeting, alone(Path(meeting)) as world:
        loop = trainer(world)
        epoch = noted_epoch(loop, epoch_of(loop, train_batches(random_split(images), world)), Path(folder))
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
