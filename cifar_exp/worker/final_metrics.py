"""The metrics at the end of a run: test set, epochs, times, communication."""

import sys
from functools import partial

from torch import nn

from cifar_exp.data.batches import EvaluationBatches
from cifar_exp.distributed import collectives, data_parallel, link_speed
from cifar_exp.distributed.process_group import World
from cifar_exp.distributed.rank_control import RankControl
from cifar_exp.records import checkpoint
from cifar_exp.training.evaluation import Mirrored, evaluate
from cifar_exp.training.metrics import MetricValues
from cifar_exp.training.trainer import ReportMetrics, Trainer
from cifar_exp.worker.job import Job
from cifar_exp.worker.training_setup import TrainingSetup


def report_end(
    job: Job, world: World, setup: TrainingSetup, control: RankControl, report: ReportMetrics, validated: MetricValues
) -> None:
    """Report the metrics of a run that has trained to its end. Call it on every rank: it evaluates and all-gathers.

    ``validated``: the last validation.
    """
    trainer = setup.trainer
    with trainer.stopwatch.span("evaluation"):
        tested = test_metrics(trainer, setup.test, validated, job, control)
    counts = {"devices": world.size, "global_batch_size": job.plan.global_batch_size}
    times = _time_metrics(trainer, job.plan.global_batch_size) | _communication_metrics(trainer, setup.model, world)
    report(trainer.step, trainer.epoch, tested | counts | _epoch_metrics(trainer, job) | times)


def test_metrics(
    trainer: Trainer, test: EvaluationBatches, validated: MetricValues, job: Job, control: RankControl
) -> dict[str, float]:
    """The metrics ``test/<metric>`` of the last epoch's network.

    With a validation split also ``test/<metric>_best``, the metrics of the best epoch's network.

    Args:
        trainer: after its last step. With a validation split, its network becomes the best epoch's.
        test: the test set.
        validated: the last validation; without a validation split it was on the test set.
        job: the run.
        control: gets heartbeats, since a large test set may take long.
    """

    def evaluated(network: nn.Module) -> MetricValues:
        return evaluate(network, test, trainer.precision, with_heartbeat, control.next_stage)

    def with_heartbeat() -> bool:
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
            collectives.wait_for_all()  # rank 0 has written the best checkpoint
            if control.rank == 0 or not job.place:  # other hosts have no checkpoints
                saved = checkpoint.best(job.run_dir, partial(print, file=sys.stderr, flush=True))
                assert saved
                trainer.evaluated.load_state_dict(saved.model)
            if job.place:
                collectives.broadcast_state(trainer.evaluated)
            best = evaluated(trainer.evaluated)
        figures |= {f"{name}_best": value for name, value in best.named("test").items()}
    return figures


def _epoch_metrics(trainer: Trainer, job: Job) -> dict[str, float]:
    """The best epoch, if validation selects one, and the last epoch, if early stopping ended training early."""
    progress = trainer.early_stopping
    epochs: dict[str, float] = {}
    if job.data.validation_count or job.early_stopping.patience:
        epochs["best_epoch"] = progress.best_epoch
    if progress.is_over and trainer.epoch < job.plan.epochs:
        epochs["stopped_epoch"] = trainer.epoch
    return epochs


def _time_metrics(trainer: Trainer, global_batch_size: int) -> dict[str, float]:
    """Training time, steady-state throughput, and where the time of the run went."""
    seconds = {"compile": 0.0, "communication": 0.0} | trainer.stopwatch.seconds
    train_seconds = sum(seconds[name] for name in ("data", "step", "communication"))
    whole = trainer.step * global_batch_size / train_seconds, trainer.step, 0  # a run of an earlier version, resumed
    rate, steps, blocks = trainer.throughput.steady() or whole
    return {
        "time/train_seconds": train_seconds,
        "steady_images_per_second": rate,
        "steady_steps": steps,
        "steady_blocks": blocks,
        **{f"time_split/{name}": value for name, value in seconds.items()},
    }


def _communication_metrics(trainer: Trainer, model: nn.Module, world: World) -> dict[str, float]:
    """Where each rank's time went, the bytes that it sends, and the bytes that the link can carry. A collective.

    A single rank has none of these metrics.
    """
    if world.size == 1:
        return {}
    size = data_parallel.gradient_bytes(model)
    links = {
        "bytes_per_step": link_speed.sent_bytes(size, world.size),
        "link_bytes_per_second": link_speed.link_bytes_per_second(size, world.device),
        **link_speed.links_of_hosts(size, world),
    }
    return trainer.rank_times.metrics() | {f"communication/{name}": value for name, value in links.items()}
