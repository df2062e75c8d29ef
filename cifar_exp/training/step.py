"""One training step of a rank: eager, or captured as a CUDA graph and replayed."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from cifar_exp.data.batches import MicroBatch, TrainBatches
from cifar_exp.distributed.data_parallel import Communication
from cifar_exp.distributed.rank_control import RankControl
from cifar_exp.training.cuda_graph import Capture, CapturedStep, capture_problem, is_capturable, rolled_back
from cifar_exp.training.evaluation import autocast
from cifar_exp.training.metrics import MetricSums
from cifar_exp.training.stopwatch import Stopwatch
from cifar_exp.training.weight_averaging import WeightEma


@dataclass
class TrainStep:
    """What one step computes: gradients over all micro-batches, the update, and the EMA of the weights.

    Attributes:
        model: the module to train, wrapped in DDP if there are several ranks.
        optimizer: the optimizer of its parameters.
        precision: dtype of convolutions and matrix products.
        label_smoothing: share of the target that is spread over all classes.
        communication: measures DDP's gradient averaging.
        control: gets a heartbeat before each wait for other ranks.
        ema_decay: decay per step of the EMA of the weights, which is then evaluated; 0 keeps no EMA.
        metric_sums: this rank's sums of the metrics since the last all-reduce.
    """

    model: nn.Module
    optimizer: Optimizer
    precision: torch.dtype
    label_smoothing: float
    communication: Communication
    control: RankControl = field(default_factory=RankControl)
    ema_decay: float = 0.0
    metric_sums: MetricSums = field(init=False)

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.metric_sums = MetricSums(self.device)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        self._captured: dict[float, CapturedStep] = {}  # by image scale
        self._captured_gradients: dict[float, list[Tensor | None]] = {}  # where the update is not in the graph
        self._ema = WeightEma(self.network, self.ema_decay) if self.ema_decay else None

    @property
    def network(self) -> nn.Module:
        """The network itself, without DDP."""
        network = self.model.module if isinstance(self.model, nn.parallel.DistributedDataParallel) else self.model
        assert isinstance(network, nn.Module)
        return network

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and exported: the EMA of the weights if there is one."""
        return self._ema.module if self._ema else self.network

    @property
    def networks(self) -> nn.ModuleList:
        """The network and its EMA. Their buffers differ between ranks until the next evaluation."""
        return nn.ModuleList([self.network, *([self.evaluated] if self._ema else [])])

    def state_dict(self) -> dict[str, Any]:
        """The state for :meth:`load_state_dict`, without the network's weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "averaged": self._ema.state_dict() if self._ema else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of the optimizer, but keep this optimizer's own settings.

        Raises:
            ValueError: the state belongs to another optimizer or network.
        """
        # Settings are replaced before loading: torch moves and casts the state by them.
        saved = state["optimizer"]
        groups = [
            {**then, **{name: now[name] for name in now if name != "params"}}
            for then, now in zip(saved["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        self._scaler.load_state_dict(state["scaler"])
        if self._ema and state["averaged"]:
            self._ema.load_state_dict(state["averaged"])

    def run(
        self,
        batches: TrainBatches,
        micro_batches: Sequence[MicroBatch],
        image_scale: float,
        lr: float,
        watch: Stopwatch,
    ) -> None:
        """Train one step.

        Args:
            batches: prepares the images of a micro-batch.
            micro_batches: the micro-batches of this step.
            image_scale: side of the images, as a share of their own.
            lr: learning rate of the update.
            watch: counts the time as ``step`` and ``data``.
        """
        with watch.span("step"):
            self._set_lr(lr)
            if self._captured:
                (micro_batch,) = micro_batches
                self._replay(micro_batch, image_scale)
            else:
                self._run_eagerly(batches, micro_batches, image_scale, watch)
            if self._ema:
                self._ema.update_parameters(self.network)
        self.control.next_stage()

    def dry_run(self, images: Tensor, labels: Tensor) -> None:
        """Run forward and backward without an update, before the first step: compiles, and lets DDP choose its buckets.

        DDP orders its buckets by the first backward pass. With more than two ranks, the rounding of the all-reduce
        depends on that order. The dry run makes the order the same after a resume.
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
        """Capture augmentation, forward and backward as a graph, and the update if the optimizer allows it.

        A captured update reads the learning rate from the device. Later steps replay the graph.

        Raises:
            RuntimeError: the step cannot be captured; steps stay eager.
        """
        if batches.accumulate > 1:
            raise RuntimeError(f"train.accumulate={batches.accumulate} takes several passes per step")
        if self._scaler.is_enabled():
            raise RuntimeError("float16 loss scaling reads each step's gradients on the host")
        with_update = is_capturable(self.optimizer)
        if with_update:
            for group in self.optimizer.param_groups:
                group["lr"] = torch.tensor(float(group["lr"]), device=self.device)
        self.model.train()
        micro_batch = batches.example()
        try:
            with rolled_back(self.model, self.optimizer):
                for scale in sorted({*batches.scales, batches.scale(1)}):  # one graph per shape
                    compute = partial(self._compute, batches, scale, with_update)
                    self._captured[scale] = CapturedStep(compute, micro_batch, capture)
                    if not with_update:  # each graph has its own gradients, which the update reads
                        self._captured_gradients[scale] = [parameter.grad for parameter in self.model.parameters()]
        except Exception as error:  # torch has no common class for what cannot be captured
            self.release()
            raise RuntimeError(capture_problem(error)) from error
        finally:
            self.metric_sums.read_and_reset()

    def release(self) -> None:
        """Delete the graphs: later steps run eagerly."""
        self._captured.clear()
        self._captured_gradients.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # a number again; each step sets its own
        self.optimizer.zero_grad(set_to_none=True)

    def _compute(self, batches: TrainBatches, scale: float, with_update: bool, *micro_batch: Tensor) -> None:
        """The captured part of a step."""
        images, labels = batches.make(*micro_batch, scale=scale)
        self.optimizer.zero_grad(set_to_none=True)
        loss, logits = self._loss(images, labels)
        loss.backward()
        if with_update:
            self._update()
        self.metric_sums.add(loss.detach(), logits.detach(), labels)

    def _replay(self, micro_batch: MicroBatch, image_scale: float) -> None:
        self._captured[image_scale](*micro_batch)
        if image_scale in self._captured_gradients:
            gradients = self._captured_gradients[image_scale]
            for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            self._update()

    def _run_eagerly(
        self, batches: TrainBatches, micro_batches: Sequence[MicroBatch], image_scale: float, watch: Stopwatch
    ) -> None:
        for number, micro_batch in enumerate(micro_batches, 1):
            with watch.span("data"):
                images, labels = batches.make(*micro_batch, scale=image_scale)
            self._accumulate_gradients(images, labels, len(micro_batches), is_last=number == len(micro_batches))
        self._update()
        self.optimizer.zero_grad(set_to_none=True)

    def _accumulate_gradients(self, images: Tensor, labels: Tensor, micro_batches: int, is_last: bool) -> None:
        """Run forward and backward on one micro-batch. Gradients are all-reduced in the last micro-batch of the step.

        ``images``: (B, 3, H, W) float32; ``labels``: (B,) int64.
        """
        parallel = self.model if isinstance(self.model, nn.parallel.DistributedDataParallel) else None
        with nullcontext() if is_last or parallel is None else parallel.no_sync():
            self.control.next_stage()  # synchronized batch norms wait for other ranks
            loss, logits = self._loss(images, labels)
            self.control.next_stage()
            self._scaler.scale(loss / micro_batches if micro_batches > 1 else loss).backward()
        self.communication.backward_done()
        self.metric_sums.add(loss.detach(), logits.detach(), labels)

    def _update(self) -> None:
        with autocast(self.device, self.precision):  # for the matrix products of Muon
            self._scaler.step(self.optimizer)
        self._scaler.update()

    def _set_lr(self, lr: float) -> None:
        """Set the learning rate of the next update; a captured optimizer reads it from a tensor."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss, (), and the logits, (B, classes)."""
        with autocast(images.device, self.precision):
            logits = self.model(images)
            return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing), logits
