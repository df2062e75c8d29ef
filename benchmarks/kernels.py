"""Where a training step's time goes by kind of operator, and what its convolutions alone would allow.

torch.profiler's self CPU time over a few steps of the package's loop (batches included, reference recipe), by kind; the
shares are of the whole wall time, so what Python and the profiler itself take is a row as well.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from harness import Figure, LoadMeter, arguments, publish
from torch.profiler import ProfilerActivity, profile
from workload import BATCH, alone, epoch_of, random_split, train_batches, trainer

from cifar_exp.augment import Shift

KINDS = {
    # The first kind with a part of the operator's name wins: forward and backward of a kind have different names.
    "convolution": ("convolution", "conv2d", "convolved", "mkldnn_reorder", "thnn_conv"),
    "batch norm": ("batch_norm", "normalizedbybatch"),  # with the ReLU of a fused layer
    "ReLU": ("relu", "threshold", "clamp_min"),
    "pooling": ("pool",),
    "augmentation": ("grid_sampl", "affine_grid", "index"),
    "optimizer": ("_foreach", "optimizer", "sgd"),
    "copies and casts": ("copy", "_to_copy", "contiguous", "clone"),
    "classifier and loss": ("addmm", "aten::mm", "softmax", "nll_loss", "argmax"),
}


def main() -> None:
    parser = arguments(__doc__, pairs=5, steps=5)
    options = parser.parse_args()
    shares: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, alone(Path(folder)) as world:
        epoch = epoch_of(trainer(world), train_batches(random_split(BATCH * options.steps), world, Shift()))
        epoch()
        meter = LoadMeter()
        for _ in range(options.pairs):
            for kind, share in profiled(epoch).items():
                shares[kind].append(share)
        load = meter.other_load()
    figures = [Figure.of(f"{kind} / step", values, "", load) for kind, values in shares.items()]
    publish("kernels", sorted(figures, key=lambda figure: -figure.value))


def profiled(epoch: Callable[[], None]) -> dict[str, float]:
    """Share of the epoch's wall time by kind of operator."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        epoch()
        wall = time.perf_counter() - began
    shares = dict.fromkeys((*KINDS, "other operators"), 0.0)
    for event in profiler.key_averages():
        shares[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / wall
    return shares | {"outside operators": 1 - sum(shares.values())}


def kind_of(operator: str) -> str:
    """A kind, or ``other operators``."""
    name = operator.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other operators")


if __name__ == "__main__":
    main()
