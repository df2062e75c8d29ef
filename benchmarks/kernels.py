"""Where a training step's time goes by kind of operator, and what its convolutions alone would allow.

On CPUs torch.profiler's self CPU time over a few steps of the package's loop (batches included, reference recipe), by
kind; the shares are of the whole wall time, so what Python and the profiler itself take is a row as well. On a GPU the
time of its kernels, by their names, and the step's arithmetic as a share of what it computes in large matrix products.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Figure, LoadMeter, arguments, publish
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from workload import (
    BATCH,
    DEVICE,
    ON_GPU,
    alone,
    epoch_of,
    network,
    random_split,
    synchronize,
    train_batches,
    trainer,
    training_flop,
    turn_steps,
)

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
GPU_KINDS = {
    "batch norm": ("batch_norm", "bn_"),
    "convolution": ("conv", "xmma", "cutlass", "cudnn", "gemm", "wgrad", "dgrad", "fprop"),  # and the classifier
    "pooling": ("pool",),
    "ReLU": ("relu", "threshold", "clamp"),
    "augmentation": ("index", "gather", "lerp", "flip"),
    "optimizer": ("multi_tensor", "fused_sgd"),
    "copies and casts": ("copy", "memcpy", "memset"),
    "loss": ("softmax", "nll_loss", "reduce"),
}
PEAK_SIDE = 8192  # of square bfloat16 matrices, which fill any GPU
PEAK_PRODUCTS = 20


def main() -> None:
    options = arguments(__doc__, pairs=5, steps=turn_steps(5)).parse_args()
    shares: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, alone(Path(folder)) as world:
        epoch = epoch_of(trainer(world), train_batches(random_split(BATCH * options.steps), world, Shift()))
        epoch()
        meter = LoadMeter()
        for _ in range(options.pairs):
            for kind, share in profiled(epoch).items():
                shares[kind].append(share)
            if ON_GPU:
                shares["arithmetic of the step, of the peak"].append(share_of_peak(epoch, options.steps))
        load = meter.other_load()
    figures = [Figure.of(f"{kind} / step", values, "", load) for kind, values in shares.items()]
    publish("kernels", sorted(figures, key=lambda figure: -figure.value))


def profiled(epoch: Callable[[], None]) -> dict[str, float]:
    """Share of the epoch's wall time by kind of operator."""
    activity, kinds = (ProfilerActivity.CUDA, GPU_KINDS) if ON_GPU else (ProfilerActivity.CPU, KINDS)
    with profile(activities=[activity]) as profiler:
        began = time.perf_counter()
        epoch()
        wall = time.perf_counter() - began
    shares = dict.fromkeys((*kinds, "other operators"), 0.0)
    for event in profiler.key_averages():
        if not ON_GPU:
            shares[kind_of(event.key, kinds)] += event.self_cpu_time_total / 1e6 / wall
        elif event.device_type == DeviceType.CUDA:
            shares[kind_of(event.key, kinds)] += event.self_device_time_total / 1e6 / wall
    return shares | {"outside operators": 1 - sum(shares.values())}


def kind_of(operator: str, kinds: dict[str, tuple[str, ...]]) -> str:
    """A kind, or ``other operators``."""
    name = operator.lower()
    return next((kind for kind, parts in kinds.items() if any(part in name for part in parts)), "other operators")


def share_of_peak(epoch: Callable[[], None], steps: int) -> float:
    """What an epoch computes in a second, over what the GPU does in large bfloat16 products, both now."""
    began = time.perf_counter()
    epoch()
    seconds = time.perf_counter() - began
    a, b = torch.randn(2, PEAK_SIDE, PEAK_SIDE, device=DEVICE, dtype=torch.bfloat16)
    torch.mm(a, b)
    synchronize()
    began = time.perf_counter()
    for _ in range(PEAK_PRODUCTS):
        torch.mm(a, b)
    synchronize()
    peak = 2 * PEAK_SIDE**3 * PEAK_PRODUCTS / (time.perf_counter() - began)
    return training_flop(network()[0]) * BATCH * steps / seconds / peak


if __name__ == "__main__":
    main()
