"""The eager step against the one with fused layers, which is what ``train.compile=auto`` takes on CPUs, and Inductor's.

Included: forward, loss, backward and update of the reference network on batches that are there. Compiling itself comes
before; its seconds are in the notes.
"""

import time
from collections.abc import Callable

import torch
from bare import bare_step
from harness import arguments, compare, publish
from workload import BATCH, fused_network, network

from cifar_exp.process import keep_freed_memory


def main() -> None:
    options = arguments(__doc__, pairs=8, steps=4).parse_args()
    keep_freed_memory()  # as ranks do
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,))

    def steps(kind: str) -> Callable[[], None]:
        model, optimizer = fused_network() if kind == "fused" else network()
        if kind == "compiled":
            model.compile()

        def run() -> None:
            for _ in range(options.steps):
                bare_step(model, optimizer, images, labels)

        return run

    eager, fused, compiled = steps("eager"), steps("fused"), steps("compiled")
    began = time.perf_counter()
    compiled()
    notes = {"seconds to compile and take the first steps": round(time.perf_counter() - began, 1)}
    rows = [
        compare(f"{name} / eager, {options.steps} steps", arm, eager, options.pairs)
        for name, arm in (("fused", fused), ("compiled", compiled))
    ]
    publish("compiled", rows, notes)


if __name__ == "__main__":
    main()
