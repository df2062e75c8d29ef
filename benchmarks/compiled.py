"""The step compiled by Inductor against the eager one, which is what ``train.compile=auto`` takes on CPUs.

Included: forward, loss, backward and update of the reference network on batches that are there. Compiling itself comes
before; its seconds are in the notes.
"""

import time
from collections.abc import Callable

import torch
from bare import bare_step
from harness import arguments, compare, publish
from workload import BATCH, network


def main() -> None:
    options = arguments(__doc__, pairs=8, steps=4).parse_args()
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,))

    def steps(compiled: bool) -> Callable[[], None]:
        model, optimizer = network()
        if compiled:
            model.compile()

        def run() -> None:
            for _ in range(options.steps):
                bare_step(model, optimizer, images, labels)

        return run

    eager, compiled = steps(False), steps(True)
    began = time.perf_counter()
    compiled()
    notes = {"seconds to compile and take the first steps": round(time.perf_counter() - began, 1)}
    publish("compiled", [compare(f"compiled / eager, {options.steps} steps", compiled, eager, options.pairs)], notes)


if __name__ == "__main__":
    main()
