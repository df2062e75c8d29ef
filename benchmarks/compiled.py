"""The eager step against the steps of ``train.compile=auto`` and ``train.compile=always`` (torch.compile).

``auto`` means fused layers on CPUs and a captured step (CUDA graph) on a GPU. On a GPU the compiled step is captured,
too. Included: forward, loss, backward and update of the reference network on ready batches. Compilation is not
included; its seconds are in the notes.
"""

import time
from collections.abc import Callable

import torch
from bare import bare_step
from harness import arguments, compare, publish
from workload import BATCH, DEVICE, ON_GPU, fused_network, network, synchronize, turn_steps

from cifar_exp.system.process import keep_freed_memory
from cifar_exp.training.cuda_graph import cuda_graph


def main() -> None:
    options = arguments(__doc__, pairs=8, steps=turn_steps(4)).parse_args()
    if not ON_GPU:
        keep_freed_memory()  # as ranks do
    images = torch.randn(BATCH, 3, 32, 32, device=DEVICE).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (BATCH,), device=DEVICE)

    def steps(kind: str) -> Callable[[], None]:
        model, optimizer = fused_network() if kind == "auto" else network()
        if kind == "compiled":
            model.compile()

        def one() -> None:
            bare_step(model, optimizer, images, labels)

        step = cuda_graph(one) if ON_GPU and kind != "eager" else one

        def run() -> None:
            for _ in range(options.steps):
                step()
            synchronize()

        return run

    eager, auto = steps("eager"), steps("auto")
    began = time.perf_counter()
    compiled = steps("compiled")
    compiled()
    notes = {"seconds to compile and take the first steps": round(time.perf_counter() - began, 1)}
    arms = {"graphed": auto, "compiled and graphed": compiled} if ON_GPU else {"fused": auto, "compiled": compiled}
    rows = [compare(f"{name} / eager, {options.steps} steps", arm, eager, options.pairs) for name, arm in arms.items()]
    publish("compiled", rows, notes)


if __name__ == "__main__":
    main()
