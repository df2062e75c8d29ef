"""The training loop of one rank: fit, train one epoch, validate. Plain PyTorch: no Hydra, no MLflow."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Any

import torch
from torch import nn

from cifar_exp.config.schema import BatchNorm
from cifar_exp.data.batches import EvaluationBatches, TrainBatches
from cifar_exp.distributed import batch_norm
from cifar_exp.distributed.collectives import sum_over_ranks
from cifar_exp.distributed.rank_control import RankControl
from cifar_exp.distributed.rank_times import RankTimes
from cifar_exp.distributed.stop_requests import Request, StopPoint
from cifar_exp.errors import DivergenceError
from cifar_exp.training.early_stopping import EarlyStopping
from cifar_exp.training.epoch_state import EpochState
from cifar_exp.training.evaluation import autocast, evaluate
from cifar_exp.training.metrics import MetricValues
from cifar_exp.training.step import TrainStep
from cifar_exp.training.stopwatch import OwnTimes, Stopwatch, timed
from cifar_exp.training.throughput import Throughput

ADVICE = "Set optimizer.lr=<smaller>, or train.precision=fp32"
ReportMetrics = Callable[[int, int, dict[str, float]], None]  # called with step, epoch, metrics
Save = Callable[[bool], None]  # called with whether the checkpoint must be saved


@dataclass
class Trainer:
    """The training loop of one rank.

    Attributes:
        train_step: computes one step.
        learning_rates: the learning rate of each step of the run.
        log_every: steps between two reads of the loss.
        report: called on every rank after every ``log_every`` steps and after each epoch. Rank 0 writes the journal.
        batch_norm: the value of ``train.batch_norm``, which selects the statistics for evaluation.
        early_stopping: gets the validation of each epoch and may end training.
        after_step: called after each step, for a profiler.
        stopwatch: counts the time of the whole run.
        epoch: epochs done.
        step: steps done.
        throughput: images/s by blocks of ``log_every`` steps.
        rank_times: how each rank spent its time, up to the last epoch end or checkpoint.
    """

    train_step: TrainStep
    learning_rates: tuple[float, ...]
    log_every: int
    report: ReportMetrics
    batch_norm: BatchNorm
    early_stopping: EarlyStopping
    after_step: Callable[[], None] = lambda: None
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    epoch: int = 0
    step: int = 0
    throughput: Throughput = field(default_factory=Throughput)
    rank_times: RankTimes = field(default_factory=RankTimes)

    def __post_init__(self) -> None:
        self._running: EpochState | None = None  # the current epoch
        self._own_times = OwnTimes()

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.train_step.device

    @property
    def control(self) -> RankControl:
        """Tells the trainer to end training before its last step."""
        return self.train_step.control

    @property
    def precision(self) -> torch.dtype:
        """The dtype of convolutions and matrix products."""
        return self.train_step.precision

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and exported: the EMA of the weights if there is one."""
        return self.train_step.evaluated

    def fit(
        self,
        batches: TrainBatches,
        validation: EvaluationBatches,
        epochs: int,
        save: Save = lambda _must: None,
    ) -> MetricValues | None:
        """Train and validate epoch by epoch, until ``epochs`` are done or early stopping ends training.

        Returns:
            The last validation; None if training was interrupted and can be resumed.
        """
        averages: MetricValues | None = None
        for epoch in range(self.epoch + 1, epochs + 1):
            if self.early_stopping.is_over:
                break
            trained = self.train_one_epoch(epoch, batches)
            request = self.control.agreed(StopPoint(self.step))
            is_interrupted = request is not None and request.kind == "interrupt"
            averages = None if is_interrupted else self._validate(validation, epoch, batches)
            if averages is None:
                save(True)
                return None
            request = request or self.control.agreed(StopPoint(self.step, in_evaluation=True))
            self.early_stopping.update(averages, epoch, self.step)
            self.close_epoch(epoch, batches)
            self.report(self.step, epoch, trained | averages.named("val"))
            with self.stopwatch.span("checkpoint"):
                save(request is not None or epoch == epochs or self.early_stopping.is_over)
            if request:
                return averages if request.kind == "stop" else None
        return averages or self._validate(validation, self.epoch, batches)  # resumed after its last epoch

    def train_one_epoch(self, epoch: int, batches: TrainBatches) -> dict[str, float]:
        """Train one epoch, or the rest of a resumed one.

        Returns:
            The epoch's metrics over all ranks; empty if training was interrupted.
        """
        state = self._begin_epoch(epoch, batches)
        watch, before = state.watch, dict(state.watch.seconds)
        last = self.step + batches.steps - state.steps
        micro_batches = timed(batches.micro_batches(epoch, state.steps), watch, "data")
        while step_batches := tuple(islice(micro_batches, batches.accumulate)):
            lr = self.learning_rates[self.step]
            if (self.step + 1) % self.control.every == 0 or self.step + 1 == last:
                self.control.approach(StopPoint(self.step + 1))
            self.train_step.run(batches, step_batches, batches.scale(epoch), lr, watch)
            averages = self._count_step(state, epoch)
            self.after_step()
            if averages:
                # The last step's lr is among the epoch's metrics, so it is left out here.
                self._report_block(state, epoch, averages, {} if self.step == last else {"lr": lr})
            if request := self._stop_request():
                if request.kind == "interrupt":
                    self._check_unread_steps(epoch)
                    self._own_times.add_steps(watch, before, self.train_step.communication)
                    return {}
                break
        with watch.span("step"):
            rest = sum_over_ranks(self.train_step.metric_sums.read_and_reset())
            state.sums += rest
            averages = MetricValues.of(state.sums)
            self._check_loss(averages, epoch)
        self._add_to_block(state, MetricValues.of(rest).count)  # the block goes on in the next epoch
        epoch_seconds = sum(watch.seconds.values())
        self._own_times.add_steps(watch, before, self.train_step.communication)
        return averages.named("train") | {
            "lr": self.learning_rates[self.step - 1],
            "epoch": epoch,
            "images_per_second": averages.count / epoch_seconds,
            "time/epoch_seconds": epoch_seconds,
        }

    def close_epoch(self, epoch: int, batches: TrainBatches) -> None:
        """Add the epoch's times to the run's times. The epoch counts as completed if all its steps were trained."""
        assert self._running
        self.stopwatch.add(self._running.watch)
        self._running.restart_clock()
        self._gather_times()
        if self._running.steps == batches.steps:
            self.epoch, self._running = epoch, None

    def state_dict(self) -> dict[str, Any]:
        """The state for :meth:`load_state_dict`, without the model. Call it on every rank: it all-gathers."""
        self._gather_times()
        running, step = self._running, self.train_step
        return step.state_dict() | {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.stopwatch.seconds,
            "throughput": self.throughput.state_dict(),
            "rank_times": self.rank_times.state_dict(),
            "unfinished": running.state_dict(step.networks, step.metric_sums.sums) if running else {},
            "early_stopping": self.early_stopping.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], same_run: bool) -> None:
        """Resume from ``state``.

        Args:
            state: what :meth:`state_dict` returned.
            same_run: True to resume a run in its run folder, with its times and early-stopping state. False for a new
                run that starts from the checkpoint.

        Raises:
            ValueError: the state belongs to another optimizer or network.
        """
        self.train_step.load_state_dict(state)
        self.epoch, self.step = state["epoch"], state["step"]
        if same_run:
            self.stopwatch.seconds = dict(state["seconds"])
            self.throughput = Throughput.load(state, self.log_every)
            self.rank_times.load_state_dict(state["rank_times"])
            self.early_stopping.load_state_dict(state["early_stopping"])
        if state["unfinished"]:
            self._running = EpochState.load(state["unfinished"], self.device, same_run)

    def rescale_progress(self, steps_per_epoch: int, batch_ratio: float) -> None:
        """Convert the steps done into steps of another global batch.

        ``batch_ratio``: old batch size / new batch size.
        """
        steps = 0
        if self._running:
            steps = self._running.steps = min(int(self._running.steps * batch_ratio), steps_per_epoch)
        self.step = self.epoch * steps_per_epoch + steps

    def _begin_epoch(self, epoch: int, batches: TrainBatches) -> EpochState:
        step = self.train_step
        step.model.train()
        if self._running is None:
            self._running = EpochState.start(self.device)
        self._running.seed_or_restore_rank(epoch, batches, step.networks, step.metric_sums.sums, self.batch_norm)
        return self._running

    def _count_step(self, state: EpochState, epoch: int) -> MetricValues | None:
        """Count one step. Every ``log_every`` steps, all-reduce and report the metrics of these steps."""
        with state.watch.span("step"):
            self.step += 1
            state.steps += 1
            self.throughput.open_steps += 1
            if self.step % self.log_every:
                return None
            sums = sum_over_ranks(self.train_step.metric_sums.read_and_reset())
            averages = MetricValues.of(sums)
            self._check_loss(averages, epoch)
            state.sums += sums
            return averages

    def _report_block(self, state: EpochState, epoch: int, averages: MetricValues, lr: dict[str, float]) -> None:
        self._add_to_block(state, averages.count)
        rate = self.throughput.end_block()
        self.report(self.step, epoch, averages.named("step") | {"step/images_per_second": rate} | lr)

    def _add_to_block(self, state: EpochState, images: int) -> None:
        seconds = sum(state.watch.seconds.values()) - state.block_seconds
        state.block_seconds += seconds
        self.throughput.add(images, seconds)

    def _stop_request(self) -> Request | None:
        """The request to stop after this step, if the ranks have agreed on one."""
        return self.control.agreed(StopPoint(self.step)) if self.step % self.control.every == 0 else None

    def _validate(self, validation: EvaluationBatches, epoch: int, batches: TrainBatches) -> MetricValues | None:
        """Evaluate on ``validation``; None if training was interrupted before all images were evaluated."""

        def may_continue() -> bool:
            self.control.approach(StopPoint(self.step, in_evaluation=True))
            return not self.control.is_interrupted()

        before = self.stopwatch.seconds.get("evaluation", 0.0)
        with self.stopwatch.span("evaluation"):
            # All ranks need equal buffers for evaluation, checkpoints and further training.
            for network in self.train_step.networks:
                batch_norm.combine_over_ranks(network, self.batch_norm)
            if self.batch_norm == "population":
                again = (
                    batches.make(*micro_batch, scale=validation.scale)[0] for micro_batch in batches.covering(epoch)
                )
                with autocast(self.device, self.precision):
                    batch_norm.recompute(self.evaluated, takewhile(lambda _images: may_continue(), again))
            averages = evaluate(self.evaluated, validation, self.precision, may_continue, self.control.next_stage)
        self._own_times.seconds["evaluation"] += self.stopwatch.seconds["evaluation"] - before
        if averages.count < len(validation.source):
            return None
        self._check_loss(averages, epoch)
        return averages

    def _check_loss(self, averages: MetricValues, epoch: int) -> None:
        """Raise if the loss is not finite. Metrics are all-reduced, so all ranks raise."""
        if not math.isfinite(averages.loss):
            raise DivergenceError(
                f"the loss is {averages.loss} by step {self.step} (epoch {epoch}): training has diverged. {ADVICE}"
            )

    def _check_unread_steps(self, epoch: int) -> None:
        """Raise if the network has diverged since the last read of the loss, so that it is not saved."""
        averages = MetricValues.of(sum_over_ranks(self.train_step.metric_sums.read()))
        if averages.count:
            self._check_loss(averages, epoch)
        # The losses do not cover the last update, so the weights are checked, too. They are equal on all ranks, so all
        # ranks raise.
        if not all(bool(parameter.isfinite().all()) for parameter in self.train_step.model.parameters()):
            raise DivergenceError(
                f"weights are not finite after step {self.step} (epoch {epoch}): training has diverged. {ADVICE}"
            )

    def _gather_times(self) -> None:
        self.rank_times.add(self._own_times.all_gather(self.device))
