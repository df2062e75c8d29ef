"""Measure on each rank the images, gradients, losses and parameters of a few steps, and the evaluation.

The measurement uses the components of a real run (``worker/training_setup.py``): network, batches, gradient averaging,
optimizer, training loop and evaluation.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar_exp.data.batches import TrainBatches
from cifar_exp.data.sources import Source, fetch, open_sources
from cifar_exp.data.validation_split import split_source
from cifar_exp.distributed.process_group import World
from cifar_exp.distributed.rank_control import RankControl
from cifar_exp.distributed.stop_requests import STOP_FILE
from cifar_exp.parity.digests import DIGEST_BYTES, HashingSource, Parameters, digests, joined, parameter_digest
from cifar_exp.system.atomic_files import atomic_path
from cifar_exp.training.evaluation import evaluate
from cifar_exp.training.metrics import MetricValues
from cifar_exp.worker.first_step import compile_or_dry_run
from cifar_exp.worker.job import Job
from cifar_exp.worker.rank_process import run_in_rank_process
from cifar_exp.worker.training_setup import TrainingSetup, build_training_setup

STEPS = 3  # training steps, fewer if the run is shorter
REFERENCE_FILE = "reference.pt"
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_READ_AT_ONCE = 500  # images


@dataclass(frozen=True)
class Measurement:
    """The measurement of one rank.

    Attributes:
        precision: ``fp32``, ``bf16`` or ``fp16``.
        inputs: sha256 of each image and label of the first epoch as the network gets it: (steps, images of this rank
            and step, 32) uint8.
        before_augmentation: sha256 of these images before augmentation.
        losses: of each training step, over all ranks.
        gradients: by training step, counted from 1, as the optimizer gets them; on rank 0 only. Steps that float16
            skips for an overflow are missing.
        parameters: after each training step, and before the first one as step 0; on rank 0 only.
        parameter_digests: sha256 in hex of this rank's parameters after each step.
        evaluated: loss, accuracy and count over all ranks of the reference's network on the test set.
        tested: sha256 of each test image and label that this rank evaluated, in order: (N, 32) uint8.
        training_set: sha256 of all training images in order; on the reference only.
        test_set: sha256 of all test images in order; on the reference only.
        network: state dict of the evaluated network; on the reference only.
    """

    precision: str
    inputs: Tensor
    before_augmentation: Tensor
    losses: list[float]
    gradients: dict[int, Parameters]
    parameters: dict[int, Parameters]
    parameter_digests: list[str]
    evaluated: MetricValues
    tested: Tensor
    training_set: Tensor
    test_set: Tensor
    network: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the measurement atomically."""
        with atomic_path(path, durable=False) as temporary:
            torch.save(vars(self) | {"evaluated": vars(self.evaluated)}, temporary)

    @classmethod
    def load(cls, path: Path) -> "Measurement":
        """Read a measurement that :meth:`save` wrote."""
        content = torch.load(path, map_location="cpu", weights_only=True)
        return cls(**content | {"evaluated": MetricValues(**content["evaluated"])})


def rank_file(rank: int) -> str:
    """The name of a rank's measurement in the job's folder."""
    return f"rank-{rank}.pt"


def measure_reference(job: Job, ipc_dir: Path) -> None:
    """Entry point of the single rank: measure and write ``REFERENCE_FILE`` to the job's folder."""
    run_in_rank_process(job, ipc_dir, partial(_measure_to, file=REFERENCE_FILE, reference_file=None))


def measure_ranks(job: Job, ipc_dir: Path) -> None:
    """Entry point of each of several ranks: measure, and evaluate the network in ``REFERENCE_FILE``."""
    run_in_rank_process(job, ipc_dir, partial(_measure_to, file=None, reference_file=REFERENCE_FILE))


def _measure_to(job: Job, world: World, control: RankControl, file: str | None, reference_file: str | None) -> None:
    reference = Measurement.load(job.run_dir / reference_file) if reference_file else None
    with open_sources(job.data, world.device, job.threads) as (train_images, test_images):
        training, _ = split_source(train_images, job.data)
        measured = measure(job, world, control, training, test_images, reference)
    measured.save(job.run_dir / (file or rank_file(world.rank)))


def measure(
    job: Job,
    world: World,
    control: RankControl,
    train_images: Source,
    test_images: Source,
    reference: Measurement | None,
) -> Measurement:
    """Hash one epoch's batches, train ``STEPS`` steps, evaluate.

    The process exits if the launcher asks the ranks to stop.

    Args:
        job: the run.
        world: this rank among the others.
        control: sends heartbeats.
        train_images: without the validation split.
        test_images: the test set.
        reference: None on the reference itself.
    """
    losses: list[float] = []
    parts = build_training_setup(
        *(job, world, control),
        lambda _step, _epoch, metrics: losses.append(metrics["step/loss"]),
        *(train_images, test_images),
    )
    inputs, before_augmentation = _one_epoch(parts.batches, control)
    compile_or_dry_run(parts.trainer, parts.batches, job.train.compile, world)
    steps = _Steps(parts, reference)
    steps.take(min(STEPS, job.plan.steps), job.run_dir / STOP_FILE if world.is_first else None, control)
    if reference:
        parts.trainer.evaluated.load_state_dict(reference.network)
    network = {name: value.cpu().clone() for name, value in parts.trainer.evaluated.state_dict().items()}
    evaluated, tested = _evaluated(parts, control)
    return Measurement(
        precision=PRECISIONS[parts.trainer.precision],
        inputs=inputs,
        before_augmentation=before_augmentation,
        losses=losses,
        gradients=steps.gradients if world.is_first else {},
        parameters=steps.parameters if world.is_first else {},
        parameter_digests=[parameter_digest(steps.parameters[step + 1]) for step in range(len(losses))],
        evaluated=evaluated,
        tested=tested,
        training_set=joined([]) if reference else _whole(train_images, control),
        test_set=joined([]) if reference else _whole(test_images, control),
        network={} if reference else network,
    )


def _one_epoch(batches: TrainBatches, control: RankControl) -> tuple[Tensor, Tensor]:
    """Digests of the first epoch's images as the network gets them, and before augmentation."""
    hashing = HashingSource(batches.source)
    inputs = []
    for images, labels in replace(batches, source=hashing).epoch(1):
        inputs.append(digests(images, labels))
        _beat_or_exit(control)
    shape = (-1, batches.accumulate * batches.batch_size, DIGEST_BYTES)
    return joined(inputs).view(shape), joined(hashing.taken).view(shape)


class _Steps:
    """Training steps with a copy of the gradients that the optimizer gets and of the parameters after each step.

    Each step starts from the reference's parameters. Otherwise rounding errors would grow from step to step, above all
    where a ReLU is active on one side only: with the reference recipe on four ranks from 2e-8 of the gradient to 6e-4
    in the second step and 6e-3 in the third.
    """

    def __init__(self, parts: TrainingSetup, reference: Measurement | None) -> None:
        self.gradients: dict[int, Parameters] = {}
        self.parameters = {0: _copied(parts.model)}
        self._parts, self._reference = parts, reference
        parts.trainer.train_step.optimizer.register_step_pre_hook(self._before_update)
        parts.trainer.after_step = self._after_step

    def take(self, steps: int, stop: Path | None, control: RankControl) -> None:
        """Train ``steps`` steps. ``stop``: the file that ends training early; None on ranks that do not create it."""
        self._steps, self._stop = steps, stop
        trainer, epoch = self._parts.trainer, 0
        self._end_if_last()
        while trainer.step < steps:
            epoch += 1
            trainer.train_one_epoch(epoch, self._parts.batches)
            trainer.close_epoch(epoch, self._parts.batches)
            _beat_or_exit(control)

    def _before_update(self, *_: object) -> None:
        found = {name: parameter.grad for name, parameter in self._parts.model.named_parameters()}
        self.gradients[self._parts.trainer.step + 1] = {
            name: gradient.detach().to("cpu", copy=True) for name, gradient in found.items() if gradient is not None
        }

    def _after_step(self) -> None:
        step = self._parts.trainer.step
        self.parameters[step] = _copied(self._parts.model)
        if self._reference:
            with torch.no_grad():
                for name, parameter in self._parts.model.named_parameters():
                    parameter.copy_(self._reference.parameters[step][name])
        self._end_if_last()

    def _end_if_last(self) -> None:
        """Create the `stop` file before the last step, so that training ends after it."""
        if self._stop and self._parts.trainer.step == self._steps - 1:
            self._stop.touch()


def _evaluated(parts: TrainingSetup, control: RankControl) -> tuple[MetricValues, Tensor]:
    """Loss and accuracy on the test set over all ranks, and digests of this rank's images."""
    hashing = HashingSource(parts.test.source)
    batches = replace(parts.test, source=hashing)
    trainer = parts.trainer

    def beat() -> bool:
        _beat_or_exit(control)
        return True

    return evaluate(trainer.evaluated, batches, trainer.precision, beat), joined(hashing.taken)


def _whole(source: Source, control: RankControl) -> Tensor:
    """The digests of a whole set in order."""
    found = []
    for start in range(0, len(source), _READ_AT_ONCE):
        found.append(digests(*fetch(source, torch.arange(start, min(start + _READ_AT_ONCE, len(source))))))
        _beat_or_exit(control)
    return joined(found)


def _beat_or_exit(control: RankControl) -> None:
    """Send a heartbeat; exit if the launcher has asked for it."""
    control.beat()
    if control.is_interrupted():
        sys.exit(1)


def _copied(model: nn.Module) -> Parameters:
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}
