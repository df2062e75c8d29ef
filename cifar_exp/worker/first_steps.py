"""Steps before the first: warm-up, compilation, CUDA graph capture."""

import torch

from cifar_exp.data.batches import TrainBatches
from cifar_exp.data.sources import fetch
from cifar_exp.distributed import collectives
from cifar_exp.distributed.process_group import World
from cifar_exp.errors import MachineError
from cifar_exp.training.cuda_graph import cuda_graph
from cifar_exp.training.trainer import Trainer

COMPILER = ("torch._dynamo", "torch._inductor")  # by name: importing them takes seconds


def prepare_steps(trainer: Trainer, batches: TrainBatches, choice: str, world: World) -> None:
    """Compile, and let DDP choose its buckets, before the first step; one eager rank has nothing to prepare."""
    compiled = choice == "always"
    torch.manual_seed(batches.noise_seed(0))  # for what the network draws before its first epoch
    with trainer.stopwatch.span("compile" if compiled else "startup"):
        if compiled or world.size > 1:
            # Compiled code is made for one shape. Buckets only need gradients: two images give them at once.
            count = batches.batch_size if compiled else min(2, batches.batch_size)
            images, labels = fetch(batches.source, torch.arange(count))
            try:
                trainer.warm_up(batches.normalization(images), labels)
            except Exception as error:
                if type(error).__module__.startswith(COMPILER):
                    raise MachineError(f"train.compile=always: {error}. Type train.compile=auto") from error
                raise


def _capture_steps(trainer: Trainer, batches: TrainBatches, choice: str, world: World) -> None:
    """Replay each step as a CUDA graph from now on, where that can be: ``benchmarks/compiled.py`` compares.

    A rank that fails in the steps before its capture, where ranks wait for each other, is the launcher's to notice.
    """
    with trainer.stopwatch.span("compile"):
        problem = ""
        try:
            trainer.capture(batches, cuda_graph)
        except RuntimeError as error:
            problem = str(error) or type(error).__name__
        failures = collectives.sum_over_ranks(torch.tensor(float(bool(problem)), device=world.device))
        if failures.item():  # on one rank alone, too: all of them take their steps in the same way
            trainer.release()
            if problem or world.is_first:
                why = problem or "another rank's cannot be captured"
                print(f"train.compile={choice}: steps are launched one by one, since {why}", flush=True)
