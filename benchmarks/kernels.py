"""The time of a training step by kind of operator, and the throughput that its convolutions alone would allow.

On CPUs: torch.profiler's self CPU time by kind, over a few steps of the package's loop (including batches, reference
recipe). Shares are of the wall time, so Python and the profiler have a row, too. On a GPU: the time of its kernels by
name, divided by the time of an epoch without the profiler; and the step's arithmetic as a share of the peak, measured
with large matrix products (about four fifths of the data sheet's peak).
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from harness import Figure, LoadMeter, arguments, publish
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from workload import (
    BATCH,
    DEVICE,
    ON_GPU,
    REAL_VALUED_SHIFT,
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

KINDS = {
    # The first kind with a part of the operator's name wins: forward and backward of a kind have different names.
    "convolution": ("convolution", "conv2d", "mkldnn_reorder", "thnn_conv"),
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
    # And the classifier.
    "convolution": ("conv", "xmma", "cutlass", "cudnn", "gemm", "nvjet", "splitk", "wgrad", "dgrad", "fprop"),
    "pooling": ("pool",),
    "ReLU": ("relu", "threshold", "clamp"),
    "augmentation": ("index", "gather", "lerp", "flip"),
    "optimizer": ("multi_tensor", "fused_sgd"),
    "copies and casts": ("copy", "memcpy", "memset"),
    "loss": ("softmax", "nll_loss", "argmax"),
    "biases and means": ("reduce_kernel", "functor_add"),
}
PEAK_SIDE = 8192  # of square bfloat16 matrices, which fill any GPU
PEAK_PRODUCTS = 20


def main() -> None:
    options = arguments(__doc__, pairs=5, steps=turn_steps(5)).parse_args()
    shares: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, alone(Path(folder)) as world:
        epoch = epoch_of(trainer(world), train_batches(random_split(BATCH * options.steps), world, REAL_VALUED_SHIFT))
        epoch()
        meter = LoadMeter()
        for _ in range(options.pairs):
            for name, share in (gpu_shares(epoch, options.steps) if ON_GPU else cpu_shares(epoch)).items():
                shares[name].append(share)
        load = meter.other_load()
    figures = [Figure.of(name, values, "", load) for name, values in shares.items()]
    publish("kernels", sorted(figures, key=lambda figure: -figure.value))


def cpu_shares(epoch: Callable[[], None]) -> dict[str, float]:
    """Share of the epoch's wall time by kind of operator."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        seconds = seconds_of(epoch)
    events = [(event.key, event.self_cpu_time_total) for event in profiler.key_averages()]
    return shares_by_kind(events, KINDS, seconds)


def gpu_shares(epoch: Callable[[], None], steps: int) -> dict[str, float]:
    """Share of the epoch's wall time by kind of kernel, and the share of the GPU's peak that the epoch reaches."""
    seconds = seconds_of(epoch)  # tracing makes a graph's launch slower
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        epoch()
    kernels = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
    events = [(kernel.key, kernel.self_device_time_total) for kernel in kernels]
    rate = training_flop(network()[0]) * BATCH * steps / seconds
    return shares_by_kind(events, GPU_KINDS, seconds) | {"arithmetic / peak": rate / peak_flop_per_second()}


def shares_by_kind(
    events: Iterable[tuple[str, float]], kinds: Mapping[str, Sequence[str]], seconds: float
) -> dict[str, float]:
    """Share of ``seconds`` by kind. ``events``: names and microseconds."""
    shares = dict.fromkeys((*kinds, "other operators"), 0.0)
    for name, microseconds in events:
        shares[kind_of(name, kinds)] += microseconds / 1e6 / seconds
    shares["outside operators"] = 1 - sum(shares.values())
    return {f"{kind} / step": share for kind, share in shares.items()}


def kind_of(operator: str, kinds: Mapping[str, Sequence[str]]) -> str:
    """The kind of an operator; ``other operators`` if no kind matches."""
    name = operator.lower()
    return next((kind for kind, parts in kinds.items() if any(part in name for part in parts)), "other operators")


def seconds_of(work: Callable[[], None]) -> float:
    """Seconds until the device has finished the work."""
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def peak_flop_per_second() -> float:
    """FLOP/s of large bfloat16 matrix products, measured now."""
    a, b = torch.randn(2, PEAK_SIDE, PEAK_SIDE, device=DEVICE, dtype=torch.bfloat16)

    def products() -> None:
        for _ in range(PEAK_PRODUCTS):
            torch.mm(a, b)

    products()
    return 2 * PEAK_SIDE**3 * PEAK_PRODUCTS / seconds_of(products)


if __name__ == "__main__":
    main()
