"""The training loop: fit, train_one_epoch, evaluate. Pure torch; it knows no configuration system and no tracker."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from cifar_exp.data import Batch, EvaluationBatches, TrainBatches
from cifar_exp.distributed import ExposedCommunication, average_buffers, sum_over_ranks
from cifar_exp.errors import DivergenceError
from cifar_exp.metrics import Averages, Stopwatch, Totals

Report = Callable[[int, int, dict[str, float]], None]  # called with step, epoch, metrics


@dataclass
class Trainer:
    """Everything that training one rank takes.

    Attributes:
        model: the module to train, in DDP where there are several ranks.
        optimizer: over its parameters.
        learning_rates: one for each step of the run.
        precision: type that convolutions and matrix products compute in.
        label_smoothing: share of the target that is spread over all classes.
        log_every: steps between two reads of the loss.
        report: takes metrics as they come; called on every rank.
        communication: what DDP's waiting is counted in.
        stopwatch: what all time is counted in.
    """

    model: nn.Module
    optimizer: Optimizer
    learning_rates: tuple[float, ...]
    precision: torch.dtype
    label_smoothing: float
    log_every: int
    report: Report
    communication: ExposedCommunication
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    step: int = 0
    block_rates: list[float] = field(default_factory=list)  # images/s of each block of `log_every` steps

    def fit(
        self,
        batches: TrainBatches,
        validation: EvaluationBatches,
        epochs: int,
        after_epoch: Callable[[int], None] = lambda _epoch: None,
    ) -> Averages:
        """Train for ``epochs`` passes, validating after each; the last validation's figures are returned."""
        scaler = torch.amp.GradScaler(batches.split.images.device.type, enabled=self.precision == torch.float16)
        averages = Averages(math.nan, math.nan, 0)
        for epoch in range(1, epochs + 1):
            trained = self.train_one_epoch(epoch, batches, scaler)
            with self.stopwatch.span("evaluation"):
                averages = evaluate(self.model, validation, self.precision)
            self._check(averages, epoch)
            self.report(self.step, epoch, trained | averages.named("val"))
            with self.stopwatch.span("checkpoint"):
                after_epoch(epoch)
        return averages

    def train_one_epoch(self, epoch: int, batches: TrainBatches, scaler: torch.amp.GradScaler) -> dict[str, float]:
        """One pass over the training set; its metrics, over all ranks."""
        self.model.train()
        device = batches.split.images.device
        epoch_sums = torch.zeros(3, dtype=torch.float64, device=device)
        block = Totals(device)
        watch = Stopwatch()
        block_seconds = 0.0
        lr = 0.0
        for images, labels in _timed(batches.epoch(epoch), watch):
            with watch.span("step"):
                lr = self.learning_rates[self.step]
                self.train_step(images, labels, lr, block, scaler)
                self.step += 1
                if self.step % self.log_every == 0:
                    sums = sum_over_ranks(block.take())
                    averages = Averages.of(sums)
                    self._check(averages, epoch)
                    epoch_sums += sums
            if self.step % self.log_every == 0:
                seconds = sum(watch.seconds.values()) - block_seconds
                block_seconds += seconds
                self.block_rates.append(averages.count / seconds)
                self.report(
                    self.step,
                    epoch,
                    averages.named("step") | {"step/images_per_second": averages.count / seconds, "lr": lr},
                )
        with watch.span("step"):
            epoch_sums += sum_over_ranks(block.take())
            averages = Averages.of(epoch_sums)
            self._check(averages, epoch)
        epoch_seconds = sum(watch.seconds.values())
        self._count(watch)
        return averages.named("train") | {
            "lr": lr,
            "epoch": epoch,
            "images_per_second": averages.count / epoch_seconds,
            "time/epoch_seconds": epoch_seconds,
        }

    def train_step(
        self, images: Tensor, labels: Tensor, lr: float, totals: Totals, scaler: torch.amp.GradScaler
    ) -> None:
        """Forward, backward, update. ``images``: (B, 3, H, W) float32; ``labels``: (B,) int64."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with autocast(images.device, self.precision):
            logits = self.model(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        scaler.scale(loss).backward()
        self.communication.backward_done()
        with autocast(images.device, self.precision):  # for the matrix products of Muon
            scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        totals.add(loss.detach(), logits.detach(), labels)

    def _check(self, averages: Averages, epoch: int) -> None:
        """Stop where the loss is not finite. All ranks hold the same sums, so all of them stop."""
        if not math.isfinite(averages.loss):
            raise DivergenceError(
                f"the loss is {averages.loss} by step {self.step} (epoch {epoch}): training has diverged. "
                f"Type a smaller optimizer.lr, or train.precision=fp32"
            )

    def _count(self, epoch: Stopwatch) -> None:
        """Add one epoch's times; what DDP waited for inside the steps is communication."""
        for name, seconds in epoch.seconds.items():
            self.stopwatch.seconds[name] = self.stopwatch.seconds.get(name, 0.0) + seconds
        self.stopwatch.move(self.communication.seconds, "step", "communication")
        self.communication.seconds = 0.0


def evaluate(model: nn.Module, batches: EvaluationBatches, precision: torch.dtype) -> Averages:
    """Loss and accuracy over the whole set: every rank evaluates its shard, sums and counts are reduced."""
    average_buffers(model)
    model.eval()
    network = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    totals = Totals(batches.split.images.device)
    with torch.inference_mode(), autocast(batches.split.images.device, precision):
        for images, labels in batches:
            logits = network(images)
            totals.add(F.cross_entropy(logits.float(), labels), logits, labels)
    return Averages.of(sum_over_ranks(totals.take()))


class Mirrored(nn.Module):
    """The mean of a network's logits for each image and for its mirror image."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """``images``: (N, 3, H, W) -> (N, classes)."""
        logits: Tensor = (self.network(images) + self.network(images.flip(3))) / 2
        return logits


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager[None]:
    """Compute convolutions and matrix products in ``precision``; float32 switches it off."""
    return torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)


def _timed(batches: Iterable[Batch], watch: Stopwatch) -> Iterator[Batch]:
    """The same batches, the time they take to make counted as data."""
    source = iter(batches)
    while True:
        with watch.span("data"):
            batch = next(source, None)
        if batch is None:
            return
        yield batch
