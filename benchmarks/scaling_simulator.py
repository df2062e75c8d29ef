"""A simulator of data-parallel training on many devices: communication, stragglers, failures, checkpoints, cost.

    python benchmarks/scaling_simulator.py                      # docs/scaling.md's table: 8, 64, 512 GPUs
    python benchmarks/scaling_simulator.py --price 2.5          # with the cost; a price has no default
    python benchmarks/scaling_simulator.py --one RUN --many RUN # predicted beside measured, from run folders

With ``--one`` and ``--many`` it reads the journals of a run on one rank and of runs on several ranks, of one host or of
several hosts. It predicts the throughput of the latter from the step of the former, its spread, and the link that the
latter measured, and prints it beside their own throughput.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median, stdev

from scaling_formulas import Cluster, Link, daly_interval, expected_runtime, exposed_seconds, slowest_of

HOUR = 3600.0
LR_PER_256 = 0.1  # of the global batch, linear: Goyal et al. (2017), and `optimizer.lr` here
SIZES = ((1, 256), (8, 256), (64, 128), (512, 16), (512, 64))  # GPUs, images of each in a step
# 235 GB/s: all-reduce over NVLink on eight A100, as nccl-tests measure it. Latencies and 20 GB/s are assumptions.
A100_HOSTS = Cluster(inside=Link(3e-6, 235e9), between=Link(10e-6, 20e9), ranks_per_host=8)


# A whole run


@dataclass(frozen=True)
class Training:
    """What is trained, and on what.

    Attributes:
        name: for the table.
        images: of an epoch.
        epochs: number of epochs.
        batch: images of a rank and step.
        images_per_second: of one rank alone.
        least_step: seconds that a step takes with any number of images, to launch its kernels.
        gradient_bytes: that are averaged in each step.
        bucket_bytes: of one all-reduce.
        backward_share: share of a step's computing after which gradients arrive evenly.
        spread: standard deviation of a rank's step over its mean.
        cluster: the links.
        image_bytes: of a stored image.
        rank_mtbf: seconds between failures of one rank.
        checkpoint: seconds that a checkpoint stops training.
        restart: seconds from a failure to training again.
    """

    name: str = "ResNet-50, ImageNet"
    images: int = 1_281_167
    epochs: int = 90
    batch: int = 256
    images_per_second: float = 2470.0
    least_step: float = 0.0
    gradient_bytes: float = 4 * 25_557_032
    bucket_bytes: float = 25 * 2**20
    backward_share: float = 1 / 3
    spread: float = 0.02
    cluster: Cluster = A100_HOSTS
    image_bytes: float = 115e3
    rank_mtbf: float = 54 * 24 * HOUR * 16_384 / 419
    checkpoint: float = 2.0
    restart: float = 300.0


@dataclass(frozen=True)
class Prediction:
    """A run on ``ranks`` ranks.

    Attributes:
        ranks: number of ranks.
        compute: seconds of a step on one rank alone.
        waiting: seconds of a step for the slowest rank.
        allreduce: seconds of all all-reduces of a step.
        exposed: of these, seconds after the backward pass.
        images_per_second: of all ranks.
        hours: of the run without failures.
        mtbf_hours: between failures of the run.
        interval_minutes: of work between checkpoints, by Daly's formula.
        overhead: share by which failures and checkpoints prolong a run of any length.
    """

    ranks: int
    compute: float
    waiting: float
    allreduce: float
    exposed: float
    images_per_second: float
    hours: float
    mtbf_hours: float
    interval_minutes: float
    overhead: float

    @property
    def step(self) -> float:
        return self.compute + self.waiting + self.exposed

    @property
    def efficiency(self) -> float:
        return self.compute / self.step


def predict(run: Training, ranks: int) -> Prediction:
    """Weak scaling: ``run.batch`` images on each rank."""
    compute = max(run.batch / run.images_per_second, run.least_step)
    buckets = max(1, math.ceil(run.gradient_bytes / run.bucket_bytes))
    each = run.cluster.allreduce_seconds(run.gradient_bytes / buckets, ranks) if ranks > 1 else 0.0
    forward = run.backward_share * compute
    ready = [forward + (compute - forward) * (number + 1) / buckets for number in range(buckets)]
    exposed = exposed_seconds(ready, [each] * buckets, compute)
    waiting = compute * run.spread * slowest_of(ranks)
    rate = ranks * run.batch / (compute + waiting + exposed)
    mtbf = run.rank_mtbf / ranks
    interval = daly_interval(run.checkpoint, mtbf)
    overhead = expected_runtime(1.0, interval, run.checkpoint, run.restart, mtbf) - 1
    hours = run.epochs * run.images / rate / HOUR
    return Prediction(
        ranks, compute, waiting, each * buckets, exposed, rate, hours, mtbf / HOUR, interval / 60, overhead
    )


def tracked_points(run: Training, ranks: int, log_every: int = 50, per_block: int = 4, per_epoch: int = 8) -> int:
    """Metric values that a run logs: of each ``log_every`` steps, of each epoch, and nine of each rank at the end."""
    steps = run.epochs * (run.images // (run.batch * ranks))
    return steps // log_every * per_block + run.epochs * per_epoch + 9 * ranks + 40


# Tables


def paper_row(run: Training, ranks: int, price: float | None) -> dict[str, str]:
    """A row of the table of predictions, by heading."""
    found, batch = predict(run, ranks), ranks * run.batch
    hours = ranks * found.hours * (1 + found.overhead)
    return {
        "GPUs": str(ranks),
        "batch of a GPU": str(run.batch),
        "global batch": f"{batch:,}",
        "learning rate": f"{LR_PER_256 * batch / 256:g}",
        "steps an epoch": f"{run.images // batch:,}",
        "computing, ms": f"{1e3 * found.compute:.1f}",
        "waiting, ms": f"{1e3 * found.waiting:.1f}",
        "all-reduce, ms": f"{1e3 * found.allreduce:.1f}",
        "exposed, ms": f"{1e3 * found.exposed:.1f}",
        "efficiency": f"{found.efficiency:.0%}",
        "images/s": f"{found.images_per_second:,.0f}",
        "reading, GB/s": f"{found.images_per_second * run.image_bytes / 1e9:.1f}",
        "hours": f"{found.hours:.2f}",
        "MTBF, h": f"{found.mtbf_hours:,.0f}",
        "checkpoint every, min": f"{found.interval_minutes:.0f}",
        "failures and checkpoints": f"{found.overhead:.2%}",
        "GPU-hours": f"{hours:.1f}",
        "cost": f"{price * hours:,.0f}" if price else "-",
        "points": f"{tracked_points(run, ranks):,}",
    }


def printed(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table."""
    lines = [[*rows[0]], ["---"] * len(rows[0]), *([*row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# Predicted beside measured


@dataclass(frozen=True)
class Measured:
    """What a run's journal says.

    Attributes:
        ranks: number of ranks.
        images_per_second: steady-state throughput of all ranks.
        spread: standard deviation of a step over its mean, from blocks of ``log_every`` steps.
        sent: bytes that a rank sends in a step.
        bandwidth: bytes/s of the link at the size of the gradients, its latency included.
    """

    ranks: int
    images_per_second: float
    spread: float
    sent: float
    bandwidth: float


def measured(folder: Path) -> Measured:
    """From the journal of a run."""
    from cifar_exp.distributed.rank_times import by_rank
    from cifar_exp.records import journal

    entries, last = journal.read(folder), journal.last_values(folder)
    blocks = [entry for entry in entries if "step/images_per_second" in entry.metrics][1:]
    steps = [after.step - before.step for before, after in pairwise(blocks)]
    rates = [entry.metrics["step/images_per_second"] for entry in blocks]
    relative = stdev(rates) / median(rates) if len(rates) > 2 else 0.0
    return Measured(
        max(1, len(by_rank(last))),
        last["steady_images_per_second"],
        relative * math.sqrt(median(steps)) if steps else 0.0,  # of one step: a block is a mean of several
        last.get("communication/bytes_per_step", 0.0),
        last.get("communication/link_bytes_per_second", math.inf),
    )


def prediction_of(one: Measured, many: Measured, batch: int) -> float:
    """Images/s of ``many``, predicted from one rank's step and the link. Nothing of its own throughput is used.

    Gradients of a CPU's ranks are averaged in one bucket after the backward pass, so all of it is exposed.

    Args:
        one: a run on one rank.
        many: a run on several ranks.
        batch: images of a rank and step.
    """
    compute = batch / one.images_per_second
    waiting = compute * one.spread * slowest_of(many.ranks)
    return many.ranks * batch / (compute + waiting + many.sent / many.bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", help="other numbers of GPUs, each with --batch images a step")
    parser.add_argument("--price", type=float, help="of a GPU and hour, in any currency")
    parser.add_argument("--batch", type=int, default=256, help="images of a rank and step")
    parser.add_argument("--images-per-second", type=float, default=Training.images_per_second, help="of one GPU")
    parser.add_argument("--least-step-ms", type=float, default=0.0, help="of a step with any number of images")
    parser.add_argument("--network-gb", type=float, default=20.0, help="GB/s of each GPU to other hosts")
    parser.add_argument("--one", type=Path, help="folder of a run on one rank")
    parser.add_argument("--many", type=Path, nargs="+", help="folders of runs on several ranks")
    options = parser.parse_args()
    if options.one and options.many:
        print(printed(beside(options.one, options.many, options.batch)))
        return
    network = replace(A100_HOSTS, between=Link(A100_HOSTS.between.latency, options.network_gb * 1e9))
    least = options.least_step_ms / 1e3
    run = Training(images_per_second=options.images_per_second, least_step=least, cluster=network)
    sizes = [(count, options.batch) for count in options.gpus] if options.gpus else SIZES
    print(printed([paper_row(replace(run, batch=batch), count, options.price) for count, batch in sizes]))


def beside(one_folder: Path, many_folders: Sequence[Path], batch: int) -> list[dict[str, str]]:
    """Predicted and measured throughput of each run, by heading."""
    one, rows = measured(one_folder), []
    for folder in many_folders:
        many = measured(folder)
        expected = prediction_of(one, many, batch)
        rows.append(
            {
                "run": folder.name,
                "ranks": str(many.ranks),
                "link, MB/s": f"{many.bandwidth / 1e6:,.0f}",
                "one rank, images/s": f"{one.images_per_second:,.0f}",
                "predicted images/s": f"{expected:,.0f}",
                "measured": f"{many.images_per_second:,.0f}",
                "measured / predicted": f"{many.images_per_second / expected:.3f}",
            }
        )
    return rows


if __name__ == "__main__":
    main()
