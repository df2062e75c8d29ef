"""``train.compile=auto`` against ``never`` on a processor that has AVX2 and no AVX512, as most laptops.

On a processor with AVX512, PyTorch, oneDNN and numba are limited to AVX2 before they are imported. Precision is
float32. Included: the package's data path, forward, loss, backward and update, on all cores of the machine.
"""

import os

os.environ |= {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "CUDA_VISIBLE_DEVICES": "",
}

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bare import bare_epoch
from harness import Comparison, Goal, arguments, compare, publish
from workload import (
    REFERENCE_NETWORK,
    ModelFactory,
    alone,
    fused_network,
    keep_freed_memory,
    network,
    random_split,
    train_batches,
)

from cifar_exp.config.defaults import settings_of
from cifar_exp.models.networks import convnet

SHAPES: dict[str, tuple[ModelFactory, int, int]] = {  # network, images a step, times as many steps a turn
    "reference network": (REFERENCE_NETWORK, 256, 1),
    "width 32, depth 2": (partial(REFERENCE_NETWORK, depth=2), 256, 2),
    "quickstart's network": (partial(convnet, **settings_of("model", "convnet_small")), 64, 40),
}


def main() -> None:
    options = arguments(__doc__, pairs=12, steps=2).parse_args()
    capability = torch.backends.cpu.get_cpu_capability()
    assert capability == "AVX2", f"PyTorch takes {capability}"
    keep_freed_memory()  # as ranks do
    rows = [measured(name, *shape, options.steps, options.pairs) for name, shape in SHAPES.items()]
    rates = {name: SHAPES[name][1] * SHAPES[name][2] * options.steps for name in SHAPES}
    notes = {
        f"images/s, {name}, auto and never": [round(rates[name] / seconds) for seconds in row.seconds]
        for name, row in zip(SHAPES, rows, strict=True)
    }
    publish("avx2", rows, {**notes, "emulated": "by NUMBA_CPU_NAME, ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY"})


def measured(name: str, build: ModelFactory, batch: int, times: int, steps: int, pairs: int) -> Comparison:
    """Compare fused layers with PyTorch's on the same batches, for one shape."""
    with tempfile.TemporaryDirectory() as folder, alone(Path(folder)) as world:
        batches = train_batches(random_split(batch * times * steps), world, batch=batch)

        def epoch(arm: tuple[torch.nn.Module, torch.optim.Optimizer]) -> Callable[[], None]:
            return bare_epoch(*arm, lambda: batches.epoch(1), torch.float32)

        auto, never = epoch(fused_network(build, torch.float32)), epoch(network(build))
        return compare(f"{name}: auto / never", auto, never, pairs, Goal("<=", 1 / 1.07))


if __name__ == "__main__":
    main()
