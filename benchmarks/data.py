"""Our data path against torchvision transforms v2 with DataLoader: flip, whole-pixel shift and normalisation.

Both start from uint8 arrays in memory and end with float32 batches of 256 on the training device, without training.
A second figure is the time that the training loop waits for batches, as a share of the step. It is measured on CPUs
only: on a GPU the captured step includes making the batch.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from harness import Figure, Goal, LoadMeter, arguments, compare_all, publish
from processes import ProcessArm
from vision import loader
from workload import (
    BATCH,
    CORES,
    DEVICE,
    ON_GPU,
    alone,
    epoch_of,
    random_split,
    synchronize,
    train_batches,
    trainer,
)

WORKERS = (0, 1, 2)


def main() -> None:
    parser = arguments(__doc__, pairs=8, steps=5)
    parser.add_argument("--images", type=int, default=10_240, help="images a turn of a data path (default: 10,240)")
    options = parser.parse_args()
    names = {f"ours / torchvision v2, {workers} worker{'s'[: workers != 1]}": workers for workers in WORKERS}
    with ExitStack() as stack:
        ours = stack.enter_context(ProcessArm(make_our_batches, options.images, threads=CORES))
        others = {
            name: stack.enter_context(ProcessArm(make_vision_batches, options.images, workers, threads=CORES))
            for name, workers in names.items()
        }
        rows = compare_all(ours, others, options.pairs, dict.fromkeys(others, Goal("<=", 1 / 10)))
    rates = {row.name: [round(options.images / seconds) for seconds in row.seconds] for row in rows}
    exposed = [] if ON_GPU else [exposed_share(options.steps, options.pairs)]
    publish("data", [*rows, *exposed], {"images/s of each": rates})


def make_our_batches(turns: Iterator[None], folder: str, images: int) -> None:
    with alone(Path(folder)) as world:
        batches = train_batches(random_split(images), world)
        for _ in turns:
            for _ in batches.epoch(1):
                pass
            synchronize()


def make_vision_batches(turns: Iterator[None], _folder: str, images: int, workers: int) -> None:
    batches = loader(random_split(images), BATCH, training=True, workers=workers)
    for _ in turns:
        for batch in batches:
            for part in batch:
                part.to(DEVICE, non_blocking=True)
        synchronize()


def exposed_share(steps: int, repeats: int) -> Figure:
    """The share of the loop's time that it waits for batches, by the loop's own timers."""
    with tempfile.TemporaryDirectory() as folder, alone(Path(folder)) as world:
        loop = trainer(world)
        epoch = epoch_of(loop, train_batches(random_split(BATCH * steps), world))
        epoch()
        meter, shares = LoadMeter(), []
        for _ in range(repeats):
            loop.stopwatch.seconds.clear()
            epoch()
            seconds = loop.stopwatch.seconds
            shares.append(seconds["data"] / sum(seconds.values()))
    return Figure.of("exposed data time / step", shares, "", meter.other_load(), Goal("<=", 0.01))


if __name__ == "__main__":
    main()
