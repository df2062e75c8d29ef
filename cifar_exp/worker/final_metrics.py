"""The metrics at the end of a run: test set, counts, times, communication."""

import sys
from functools import partial
from statistics import median

from torch import nn

from cifar_exp.data.batches import EvaluationBatches
from cifar_exp.distributed import collectives, data_parallel
from cifar_exp.distributed.heartbeat import Control
from cifar_exp.distributed.process_group import World
from cifar_exp.records import checkpoint
from cifar_exp.training.evaluation import Mirrored, evaluate
from cifar_exp.training.metrics import Averages
from cifar_exp.training.trainer import Trainer
from cifar_exp.worker.job import Job


def _communication(trainer: Trainer, model: nn.Module, world: World) -> dict[str, float]:
    """Where the time of each of several ranks went, and what they sent beside what the link can carry."""
    if world.size == 1:
        return {}
    size = data_parallel.gradient_bytes(model)
    return trainer.rank_times.metrics() | {
        "communication/bytes_per_step": data_parallel.sent_bytes(size, world.size),
        "communication/link_bytes_per_second": data_parallel.link_bytes_per_second(size, world.device),
    }


def _tested(
    trainer: Trainer, test: EvaluationBatches, validated: Averages, job: Job, control: Control
) -> dict[str, float]:
    """What the test set says of the last network and, where images are kept apart, of the best epoch's.

    Args:
        trainer: after its last step; its network is the best epoch's in the end.
        test: the test set.
        validated: the last validation, which was on the test set where no images are kept apart.
        job: the whole run.
        control: given signs of life, since a large test set may take long.
    """

    def evaluated(network: nn.Module) -> Averages:
        return evaluate(network, test, trainer.precision, go_on, control.got_on)

    def go_on() -> bool:
        control.beat()
        return True

    final = evaluated(trainer.evaluated) if job.data.validation_count else validated
    figures = final.named("test") | {"test/count": final.count}
    if job.train.mirrored_evaluation:
        mirrored = evaluated(Mirrored(trainer.evaluated))
        figures["test/accuracy_mirrored"] = mirrored.accuracy
    if job.data.validation_count:
        best = final
        if trainer.early_stopping.best_step != trainer.step:
            collectives.wait_for_all()  # the first rank has it on disk
            saved = checkpoint.best(job.run_dir, partial(print, file=sys.stderr, flush=True))
            assert saved
            trainer.evaluated.load_state_dict(saved.model)
            best = evaluated(trainer.evaluated)
        figures |= {f"{name}_best": value for name, value in best.named("test").items()}
    return figures


def _epochs(trainer: Trainer, job: Job) -> dict[str, float]:
    """The best epoch where one is looked for, and the last one where that was not the plan's."""
    progress = trainer.early_stopping
    epochs: dict[str, float] = {}
    if job.data.validation_count or job.early_stopping.patience:
        epochs["best_epoch"] = progress.best_epoch
    if progress.is_over and trainer.epoch < job.plan.epochs:
        epochs["stopped_epoch"] = trainer.epoch
    return epochs


def _times(trainer: Trainer, global_batch_size: int) -> dict[str, float]:
    """Training time, the steady rate, and where all time went."""
    seconds = {"compile": 0.0, "communication": 0.0} | trainer.stopwatch.seconds
    train_seconds = sum(seconds[name] for name in ("data", "step", "communication"))
    blocks = trainer.block_rates[1:] or trainer.block_rates or [trainer.step * global_batch_size / train_seconds]
    return {
        "time/train_seconds": train_seconds,
        "steady_images_per_second": median(blocks),  # blocks of log_every steps, without the first, the warm-up
        **{f"time_split/{name}": value for name, value in seconds.items()},
    }
