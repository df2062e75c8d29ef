"""The training loop: fit, train_one_epoch, evaluate. Pure torch; it knows no configuration system and no tracker."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from cifar_exp.config.schema import BatchNorm
from cifar_exp.data.batches import Draw, EvaluationBatches, TrainBatches
from cifar_exp.distributed import batch_norm
from cifar_exp.distributed.collectives import gathered, rows, sum_over_ranks
from cifar_exp.distributed.data_parallel import Communication
from cifar_exp.distributed.heartbeat import Control
from cifar_exp.distributed.rank_times import MEASURED, RankTimes
from cifar_exp.errors import DivergenceError
from cifar_exp.system.accelerator import exact_device, random_state, set_random_state
from cifar_exp.training.cuda_graph import Capture, CapturedStep, may_be_captured, told, undone
from cifar_exp.training.early_stopping import EarlyStopping
from cifar_exp.training.epoch_state import Unfinished
from cifar_exp.training.evaluation import autocast, evaluate
from cifar_exp.training.metrics import Averages, Totals
from cifar_exp.training.stopwatch import Stopwatch
from cifar_exp.training.weight_averaging import RunningMean

LESS = "Type a smaller optimizer.lr, or train.precision=fp32"
Report = Callable[[int, int, dict[str, float]], None]  # called with step, epoch, metrics
Save = Callable[[bool], None]  # called with whether the state must be kept


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
        communication: what DDP's averaging of gradients is counted in.
        control: says whether training should end before its last step.
        batch_norm: what batch norms are evaluated with; whose statistics they normalise by is the network's own.
        averaging: decay a step of the running mean of the weights, which is what is evaluated; 0 evaluates the weights
            themselves.
        early_stopping: told of each epoch's validation, ends training.
        after_step: called after each step, for a profiler.
        stopwatch: what all time is counted in.
        epoch: epochs done.
        step: steps done.
        block_rates: images/s of each block of ``log_every`` steps.
        rank_times: where the time of each rank went, up to the last epoch's end or save.
    """

    model: nn.Module
    optimizer: Optimizer
    learning_rates: tuple[float, ...]
    precision: torch.dtype
    label_smoothing: float
    log_every: int
    report: Report
    communication: Communication
    control: Control = field(default_factory=Control)
    batch_norm: BatchNorm = "averaged"
    averaging: float = 0.0
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    after_step: Callable[[], None] = lambda: None
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    epoch: int = 0
    step: int = 0
    block_rates: list[float] = field(default_factory=list)
    rank_times: RankTimes = field(default_factory=RankTimes)

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        self._block = Totals(self.device)
        self._captured: dict[float, CapturedStep] = {}  # by the scale of the images
        self._gradients: dict[float, list[Tensor | None]] = {}
        self._unfinished: Unfinished | None = None
        self._ranks: list[dict[str, Any]] = []  # what each had of its own in the midst of the epoch that goes on
        self._own = dict.fromkeys(MEASURED, 0.0)  # seconds of this rank that rank_times has not got yet
        self._exposed: list[float] = []
        self._averaged = RunningMean(self._network, self.averaging) if self.averaging else None

    @property
    def _network(self) -> nn.Module:
        """The network itself, without what averages its gradients over ranks."""
        network = self.model.module if isinstance(self.model, nn.parallel.DistributedDataParallel) else self.model
        assert isinstance(network, nn.Module)
        return network

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and used in the end: with averaged weights where these are kept."""
        return self._averaged.module if self._averaged else self._network

    def fit(
        self,
        batches: TrainBatches,
        validation: EvaluationBatches,
        epochs: int,
        save: Save = lambda _must: None,
    ) -> Averages | None:
        """Train up to ``epochs`` passes, validating after each, or until early stopping ends it.

        Returns:
            The last validation's figures; None where training was left to go on another time.
        """
        averages: Averages | None = None
        for epoch in range(self.epoch + 1, epochs + 1):
            if self.early_stopping.is_over:
                break
            trained = self.train_one_epoch(epoch, batches)
            request = self.control.agreed(2 * self.step)
            is_leaving = request is not None and request.kind == "leave"
            averages = None if is_leaving else self._evaluate(validation, epoch, batches)
            if averages is None:
                save(True)
                return None
            request = request or self.control.agreed(2 * self.step + 1)
            self.early_stopping.update(averages, epoch, self.step)
            self.close_epoch(epoch, batches)
            self.report(self.step, epoch, trained | averages.named("val"))
            with self.stopwatch.span("checkpoint"):
                save(request is not None or epoch == epochs or self.early_stopping.is_over)
            if request:
                return averages if request.kind == "finish" else None
        return averages or self._evaluate(validation, self.epoch, batches)  # it was stopped after its last epoch

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on from here; the model is not in it. Called on every rank."""
        self._gather_times()
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "averaged": self._averaged.state_dict() if self._averaged else {},
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.stopwatch.seconds,
            "block_rates": self.block_rates,
            "rank_times": self.rank_times.state_dict(),
            "unfinished": self._unfinished_state() if self._unfinished else {},
            "early_stopping": self.early_stopping.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], same_run: bool) -> None:
        """Go on where ``state`` was taken, with this optimizer's own settings.

        Args:
            state: of the trainer that is continued.
            same_run: whether this is the same run, whose times and early stopping go on, too.

        Raises:
            ValueError: where the state is that of another optimizer or network.
        """
        # Before loading, since torch moves and casts state by what the groups say.
        saved = state["optimizer"]
        groups = [
            {**then, **{name: now[name] for name in now if name != "params"}}
            for then, now in zip(saved["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        self._scaler.load_state_dict(state["scaler"])
        if self._averaged and state["averaged"]:
            self._averaged.load_state_dict(state["averaged"])
        self.epoch, self.step = state["epoch"], state["step"]
        if same_run:
            self.stopwatch.seconds = dict(state["seconds"])
            self.block_rates = list(state["block_rates"])
            self.rank_times.load_state_dict(state["rank_times"])
            self.early_stopping.load_state_dict(state["early_stopping"])
        if unfinished := state["unfinished"]:
            watch = Stopwatch(dict(unfinished["seconds"]) if same_run else {})
            block_seconds = unfinished["block_seconds"] if same_run else 0.0
            sums = unfinished["sums"].to(exact_device(self.device))
            self._unfinished = Unfinished(sums, unfinished["steps"], watch, block_seconds)
            self._ranks = unfinished["ranks"]

    def share_epoch_anew(self, steps_per_epoch: int, share: float) -> None:
        """Go on with batches of another size: ``share`` is the size that they had over the one that they have now."""
        steps = 0
        if self._unfinished:
            steps = self._unfinished.steps = min(int(self._unfinished.steps * share), steps_per_epoch)
        self.step = self.epoch * steps_per_epoch + steps

    def _unfinished_state(self) -> dict[str, Any]:
        assert self._unfinished
        buffers = [buffer.cpu() for buffer in self._networks().buffers()]
        mine = random_state(self.device) | {"buffers": buffers, "sums": self._block.sums.cpu()}
        return {
            "sums": self._unfinished.sums,
            "steps": self._unfinished.steps,
            "seconds": self._unfinished.watch.seconds,
            "block_seconds": self._unfinished.block_seconds,
            "ranks": gathered(mine),
        }

    def _networks(self) -> nn.ModuleList:
        """Those whose buffers, statistics of batch norms, are each rank's own until the next evaluation."""
        return nn.ModuleList([self._network, *([self.evaluated] if self._averaged else [])])

    def _take_up_epoch(self, epoch: int, batches: TrainBatches) -> None:
        """Give this rank what it had of its own. Other ranks than then share it: the first has the sums."""
        ranks, self._ranks = self._ranks, []
        same = len(ranks) == batches.world_size
        if same:
            set_random_state(ranks[batches.rank], self.device)
        else:
            torch.manual_seed(batches.noise_seed(epoch))
        if not ranks:
            return
        mine = ranks[batches.rank : batches.rank + 1] if same else ranks
        statistics = mine[:1] if self.batch_norm == "local" else mine
        batch_norm.take_over(self._networks(), [rank["buffers"] for rank in statistics])
        if same or batches.rank == 0:
            self._block.sums.copy_(torch.stack([rank["sums"] for rank in mine]).sum(0).to(self._block.sums.dtype))

    def warm_up(self, images: Tensor, labels: Tensor) -> None:
        """A step that changes nothing: compilation and DDP's choice of buckets come before the first real one.

        DDP orders its buckets by the first backward pass. A resumed run has to have the order that the run before had,
        since sums over more than two ranks depend on it in the last bits.
        """
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        self.model.train()
        self._loss(images, labels)[0].backward()
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        self.communication.backward_done()
        self.communication.take()

    def capture(self, batches: TrainBatches, capture: Capture) -> None:
        """Take every step from now on by replaying one that is captured: augmentation, forward, backward, and the
        update where the optimizer may be captured, which then reads its rate from the device.

        Raises:
            RuntimeError: where the step cannot be captured, as in float16, whose scaler asks the host; steps are then
                taken one by one as before.
        """
        if batches.accumulate > 1:
            raise RuntimeError(f"train.accumulate={batches.accumulate} makes several passes of each")
        if self._scaler.is_enabled():
            raise RuntimeError("float16 scales the loss by what the host reads of each step")
        with_update = may_be_captured(self.optimizer)
        if with_update:
            self._set_lr(torch.tensor(self.learning_rates[0], device=self.device))

        def compute(scale: float, *draw: Tensor) -> None:
            images, labels = batches.make(*draw, scale=scale)
            self.optimizer.zero_grad(set_to_none=True)
            loss, logits = self._loss(images, labels)
            loss.backward()
            if with_update:
                self._update()
            self._block.add(loss.detach(), logits.detach(), labels)

        self.model.train()
        draw = batches.example()
        try:
            with undone(self.model, self.optimizer):
                for scale in sorted({*batches.scales, batches.scale(1)}):  # each a step of its own shape
                    self._captured[scale] = CapturedStep(partial(compute, scale), draw, capture)
                    if not with_update:  # each capture has gradients of its own, which the update has to find
                        self._gradients[scale] = [parameter.grad for parameter in self.model.parameters()]
        except Exception as error:  # torch has no common class for what cannot be captured
            self.release()
            raise RuntimeError(told(error)) from error
        finally:
            self._block.take()

    def release(self) -> None:
        """Take steps one by one again."""
        self._captured.clear()
        self._gradients.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rates[0]
        self.optimizer.zero_grad(set_to_none=True)

    def train_one_epoch(self, epoch: int, batches: TrainBatches) -> dict[str, float]:
        """One pass over the training set, or what is left of it; the epoch's metrics, over all ranks.

        Nothing where training is left in the midst.
        """
        self.model.train()
        if self._unfinished is None:
            self._unfinished = Unfinished(torch.zeros(3, dtype=torch.float64, device=exact_device(self.device)))
        progress = self._unfinished
        watch = progress.watch
        before = dict(watch.seconds)
        self._take_up_epoch(epoch, batches)
        last = self.step + batches.steps - progress.steps
        micro_batches = _timed(batches.draws(epoch, progress.steps), watch)
        while draws := tuple(islice(micro_batches, batches.accumulate)):
            lr = self.learning_rates[self.step]
            if (self.step + 1) % self.control.every == 0 or self.step + 1 == last:
                self.control.ask(2 * (self.step + 1))
            self._take_step(batches, draws, batches.scale(epoch), lr, watch)
            with watch.span("step"):
                self.step += 1
                progress.steps += 1
                if self.step % self.log_every == 0:
                    sums = sum_over_ranks(self._block.take())
                    averages = Averages.of(sums)
                    self._check(averages, epoch)
                    progress.sums += sums
            self.after_step()
            if self.step % self.log_every == 0:
                seconds = sum(watch.seconds.values()) - progress.block_seconds
                progress.block_seconds += seconds
                self.block_rates.append(averages.count / seconds)
                metrics = averages.named("step") | {"step/images_per_second": averages.count / seconds}
                # The epoch has its rate in its own metrics: nothing is reported twice for one step.
                self.report(self.step, epoch, metrics if self.step == last else metrics | {"lr": lr})
            if self.step % self.control.every == 0 and (request := self.control.agreed(2 * self.step)):
                if request.kind == "leave":
                    self._check_what_is_left(epoch)
                    self._count_times(watch, before)
                    return {}
                break
        with watch.span("step"):
            progress.sums += sum_over_ranks(self._block.take())
            averages = Averages.of(progress.sums)
            self._check(averages, epoch)
        epoch_seconds = sum(watch.seconds.values())
        self._count_times(watch, before)
        return averages.named("train") | {
            "lr": self.learning_rates[self.step - 1],
            "epoch": epoch,
            "images_per_second": averages.count / epoch_seconds,
            "time/epoch_seconds": epoch_seconds,
        }

    def close_epoch(self, epoch: int, batches: TrainBatches) -> None:
        """Add the epoch's times to the run's; one that was trained to its end is done."""
        assert self._unfinished
        for name, seconds in self._unfinished.watch.seconds.items():
            self.stopwatch.seconds[name] = self.stopwatch.seconds.get(name, 0.0) + seconds
        self._unfinished.watch, self._unfinished.block_seconds = Stopwatch(), 0.0
        self._gather_times()
        if self._unfinished.steps == batches.steps:
            self.epoch, self._unfinished = epoch, None

    def _take_step(
        self, batches: TrainBatches, draws: Sequence[Draw], scale: float, lr: float, watch: Stopwatch
    ) -> None:
        with watch.span("step"):
            self._set_lr(lr)
            if self._captured:
                (draw,) = draws
                self._captured[scale](*draw)
                if not isinstance(self.optimizer.param_groups[0]["lr"], Tensor):
                    for parameter, gradient in zip(self.model.parameters(), self._gradients[scale], strict=True):
                        parameter.grad = gradient
                    self._update()
            else:
                for number, draw in enumerate(draws, 1):
                    with watch.span("data"):
                        images, labels = batches.make(*draw, scale=scale)
                    self._add_gradients(images, labels, len(draws), is_last=number == len(draws))
                self._update()
                self.optimizer.zero_grad(set_to_none=True)
            if self._averaged:
                self._averaged.update_parameters(self._network)
        self.control.got_on()

    def _add_gradients(self, images: Tensor, labels: Tensor, micro_batches: int, is_last: bool) -> None:
        """Forward and backward; ranks average their gradients in the last of a step's micro-batches.

        ``images``: (B, 3, H, W) float32; ``labels``: (B,) int64.
        """
        parallel = self.model if isinstance(self.model, nn.parallel.DistributedDataParallel) else None
        with nullcontext() if is_last or parallel is None else parallel.no_sync():
            self.control.got_on()  # batch norms may wait for other ranks
            loss, logits = self._loss(images, labels)
            self.control.got_on()
            self._scaler.scale(loss / micro_batches if micro_batches > 1 else loss).backward()
        self.communication.backward_done()
        self._block.add(loss.detach(), logits.detach(), labels)

    def _update(self) -> None:
        with autocast(self.device, self.precision):  # for the matrix products of Muon
            self._scaler.step(self.optimizer)
        self._scaler.update()

    def _set_lr(self, lr: float | Tensor) -> None:
        """The rate of the next update; a captured optimizer reads it from the tensor that it was captured with."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(images.device, self.precision):
            logits = self.model(images)
            return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing), logits

    def _evaluate(self, validation: EvaluationBatches, epoch: int, batches: TrainBatches) -> Averages | None:
        """The figures; None where training was left before all images were evaluated."""

        def go_on() -> bool:
            self.control.ask(2 * self.step + 1)
            return not self.control.is_leaving()

        before = self.stopwatch.seconds.get("evaluation", 0.0)
        with self.stopwatch.span("evaluation"):
            batch_norm.settle(self._network, self.batch_norm)  # what is saved must be what every rank goes on with
            if self._averaged:
                batch_norm.settle(self.evaluated, self.batch_norm)
            if self.batch_norm == "population":
                again = (batches.make(*draw, scale=validation.scale)[0] for draw in batches.draws(epoch))
                with autocast(self.device, self.precision):
                    batch_norm.recompute(self.evaluated, takewhile(lambda _images: go_on(), again))
            averages = evaluate(self.evaluated, validation, self.precision, go_on, self.control.got_on)
        self._own["evaluation"] += self.stopwatch.seconds["evaluation"] - before
        if averages.count < len(validation.source):
            return None
        self._check(averages, epoch)
        return averages

    def _check(self, averages: Averages, epoch: int) -> None:
        """Stop where the loss is not finite. All ranks hold the same sums, so all of them stop."""
        if not math.isfinite(averages.loss):
            raise DivergenceError(
                f"the loss is {averages.loss} by step {self.step} (epoch {epoch}): training has diverged. {LESS}"
            )

    def _check_what_is_left(self, epoch: int) -> None:
        """Stop rather than save a network that has diverged since the loss was last read."""
        averages = Averages.of(sum_over_ranks(self._block.read()))
        if averages.count:
            self._check(averages, epoch)
        # The last update came after the last loss. All ranks hold the same weights, so all of them stop.
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise DivergenceError(
                f"weights are not finite after step {self.step} (epoch {epoch}): training has diverged. {LESS}"
            )

    def _count_times(self, watch: Stopwatch, before: Mapping[str, float]) -> None:
        """What DDP waited for inside the steps is communication; ``before``: the watch at their beginning."""
        exposed, hidden = self.communication.take()
        watch.move(sum(exposed), "step", "communication")
        self._exposed += exposed
        self._own["hidden_communication"] += hidden
        for name, span in (("compute", "step"), ("data", "data")):
            self._own[name] += watch.seconds.get(span, 0.0) - before.get(span, 0.0)

    def _gather_times(self) -> None:
        self.rank_times.add(rows([*self._own.values(), *self._exposed], self.device).tolist())
        self._own, self._exposed = dict.fromkeys(MEASURED, 0.0), []


def _timed(draws: Iterable[Draw], watch: Stopwatch) -> Iterator[Draw]:
    """The same draws, the time they take to make counted as data."""
    source = iter(draws)
    while True:
        with watch.span("data"):
            draw = next(source, None)
        if draw is None:
            return
        yield draw
