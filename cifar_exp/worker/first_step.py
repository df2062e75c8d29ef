"""Prepare the first training step: compilation, DDP's buckets, CUDA graph capture."""

import torch

from cifar_exp.data.batches import TrainBatches
from cifar_exp.data.sources import fetch
from cifar_exp.distributed import collectives
from cifar_exp.distributed.process_group import World
from cifar_exp.errors import MachineError
from cifar_exp.training.cuda_graph import cuda_graph
from cifar_exp.training.trainer import Trainer

COMPILER = ("torch._dynamo", "torch._inductor")  # compared as names: importing them takes seconds


def prepare_first_step(trainer: Trainer, batches: TrainBatches, choice: str, world: World) -> None:
    """Compile the network, let DDP choose its buckets, and capture the step as a CUDA graph where that is possible.

    ``choice``: the value of ``train.compile``.
    """
    compile_or_dry_run(trainer, batches, choice, world)
    if world.device.type == "cuda" and choice != "never":
        _capture(trainer, batches, choice, world)


def compile_or_dry_run(trainer: Trainer, batches: TrainBatches, choice: str, world: World) -> None:
    """Compile the network and let DDP choose its buckets. A single rank without torch.compile needs neither.

    ``choice``: the value of ``train.compile``.
    """
    compiled = choice == "always"
    torch.manual_seed(batches.dropout_seed(0))  # for the network's random numbers before its first epoch
    with trainer.stopwatch.span("compile" if compiled else "startup"):
        if compiled or world.size > 1:
            # Compiled code is specialized to one shape. DDP only needs gradients, which two images give quickly.
            count = batches.batch_size if compiled else min(2, batches.batch_size)
            images, labels = fetch(batches.source, torch.arange(count))
            try:
                trainer.train_step.dry_run(batches.normalization(images), labels)
            except Exception as error:
                if type(error).__module__.startswith(COMPILER):
                    raise MachineError(f"train.compile=always: {error}. Set train.compile=auto") from error
                raise


def _capture(trainer: Trainer, batches: TrainBatches, choice: str, world: World) -> None:
    """Capture the step as a CUDA graph; ``benchmarks/compiled.py`` compares.

    If one rank cannot capture the step, all ranks run eagerly. If a rank fails in the warm-up steps of the capture, the
    others wait in an all-reduce until the watchdog kills the hung ranks.
    """
    with trainer.stopwatch.span("compile"):
        problem = ""
        try:
            trainer.train_step.capture(batches, cuda_graph)
        except RuntimeError as error:
            problem = str(error) or type(error).__name__
        failures = collectives.sum_over_ranks(torch.tensor(float(bool(problem)), device=world.device))
        if failures.item():
            trainer.train_step.release()
            if problem or world.is_first:
                why = problem or "on another rank"
                print(f"train.compile={choice}: CUDA graph capture failed ({why}): running eagerly", flush=True)
