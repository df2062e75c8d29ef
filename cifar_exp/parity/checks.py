"""Compare the measurements of N ranks with those of one rank: each check with its value and tolerance. No I/O."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cifar_exp.parity.digests import DIGEST_BYTES, Parameters
from cifar_exp.parity.measure import Measurement
from cifar_exp.training.plan import Plan

Subject = Literal["images", "gradients", "evaluation"]


@dataclass(frozen=True)
class Tolerances:
    """The largest allowed differences between N ranks and one; all are relative, except that of the accuracy.

    Attributes:
        gradient: norm of a tensor's difference / norm of the whole gradient.
        loss: difference of a step's loss.
        parameters: distance between the networks after a step / length of the step. Optimizers that divide by the size
            of a gradient, such as Adam, turn a tiny gradient, whose sign depends on rounding, into a whole step.
        accuracy: difference of the test accuracies of one network.
        evaluation_loss: difference of the test losses of one network.
        why: the reason for these tolerances, in words.
    """

    gradient: float
    loss: float
    parameters: float
    accuracy: float
    evaluation_loss: float
    why: str


# The measured values below are those of the reference network with 64 images per rank.
_SAME_ARITHMETIC = (1e-5, 1e-6, 1e-4)  # measured: 3e-8, 0, 3e-6 (AdamW)
_DIVISION_ROUNDS = {  # measured on 3 ranks: fp32 5e-6, 0, 1e-3 (AdamW); bf16 9e-3, 0, 2e-2; fp16 1e-3, 0, 3e-3
    "fp32": (1e-4, 1e-6, 1e-2),
    "bf16": (2**-5, 1e-6, 2**-2),
    "fp16": (2**-8, 1e-6, 2**-3),
}
# Measured with synchronized batch-norm statistics: fp32 1e-2, 9e-7, 2e-2; bf16 1e-1, 2e-4, 2e-1. Without: fp32 3e-1,
# 4e-3, 7e-1; bf16 3e-1, 6e-4, 6e-1. So fp32 distinguishes both well.
_SYNCHRONIZED = {"fp32": (5e-2, 1e-5, 2**-2), "bf16": (2e-1, 1e-3, 2**-1), "fp16": (1e-1, 1e-4, 2**-2)}
_EVALUATION = {"fp32": (0.0, 1e-6), "bf16": (2e-3, 1e-3), "fp16": (5e-4, 1e-4)}  # some batches have another size
_WHY_SAME_ARITHMETIC = """\
Both sides do the same arithmetic for each micro-batch, but sum the gradients in another order. Each sum has a relative
rounding error of up to 6e-8; {0:.2g} of the gradient is allowed."""
_WHY_DIVISION_ROUNDS = """\
One rank divides the loss of each micro-batch by their number before the backward pass; several ranks divide the
gradients. Unless that number is a power of two, and always in float16, each layer is then rounded differently: {0:.2g}
of the gradient is allowed."""
_WHY_SYNCHRONIZED = """\
The batch statistics of all ranks are summed in another order, so a ReLU whose input is almost zero may switch: {0:.2g}
of the gradient is allowed. The loss has no such jumps; it shows best whether the statistics are synchronized."""


def tolerances(precision: str, ranks: int, is_synchronized: bool) -> Tolerances:
    """The tolerances for ``fp32``, ``bf16`` or ``fp16``. ``is_synchronized``: batch norm spans all ranks."""
    if is_synchronized and ranks > 1:
        limits, why = _SYNCHRONIZED[precision], _WHY_SYNCHRONIZED
    elif precision != "fp16" and ranks.bit_count() == 1:
        limits, why = _SAME_ARITHMETIC, _WHY_SAME_ARITHMETIC
    else:
        limits, why = _DIVISION_ROUNDS[precision], _WHY_DIVISION_ROUNDS
    return Tolerances(*limits, *_EVALUATION[precision], why.format(limits[0]))


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        subject: the report section.
        name: the measured quantity.
        wanted: the limit, in words.
        found: the value, in words.
        measured: deviation from the expected value.
        tolerance: largest allowed deviation.
        detail: where the largest difference is, or the compared values.
    """

    subject: Subject
    name: str
    wanted: str
    found: str
    measured: float
    tolerance: float
    detail: str = ""

    @property
    def holds(self) -> bool:
        """Whether the deviation is within the tolerance; False for NaN."""
        return self.measured <= self.tolerance


def compared(reference: Measurement, ranks: Sequence[Measurement], plan: Plan, allowed: Tolerances) -> list[Check]:
    """All checks.

    Args:
        reference: the measurement of one rank that accumulates the micro-batches of all ranks.
        ranks: the measurement of each rank, in order.
        plan: the plan of these ranks.
        allowed: the tolerances.
    """
    return [
        *_images(reference, ranks, plan),
        *_gradients(reference, ranks, allowed),
        *_evaluation(reference, ranks, allowed),
    ]


def epoch_digest(ranks: Sequence[Measurement]) -> str:
    """sha256 in hex over the digests of the first epoch's images in order, as the network gets them."""
    return hashlib.sha256(_side_by_side([rank.inputs for rank in ranks]).contiguous().numpy().tobytes()).hexdigest()


def relative_difference(ours: Parameters, theirs: Parameters) -> tuple[float, str]:
    """The largest norm of a tensor's difference / the norm of all of ``theirs``, and the name of that tensor.

    Equal infinities and NaNs count as equal.
    """
    if ours.keys() != theirs.keys():
        return math.inf, "other parameters"
    differences = {name: _norm([_difference(ours[name], theirs[name])]) for name in theirs}
    # NaN counts as the largest.
    worst = max(differences, key=lambda name: (math.isnan(differences[name]), differences[name]))
    return _ratio(differences[worst], _norm(theirs.values())), worst if differences[worst] else ""


def _images(reference: Measurement, ranks: Sequence[Measurement], plan: Plan) -> Iterator[Check]:
    ours, theirs = _side_by_side([rank.inputs for rank in ranks]), reference.inputs
    count = ours.shape[0] * ours.shape[1] // plan.per_device_batch_size
    differing = count
    if ours.shape == theirs.shape:
        images = (ours != theirs).any(-1)
        differing = int(images.view(-1, plan.per_device_batch_size).any(1).sum())
    yield Check("images", "micro-batches that differ in a bit", "0", f"{differing:,} of {count:,}", differing, 0)
    taken = _side_by_side([rank.before_augmentation for rank in ranks])
    seen, whole = (Counter(_rows(part)) for part in (taken, reference.training_set))
    doubled, dropped = (seen - whole).total(), (whole - seen).total()
    yield Check("images", "images doubled or foreign", "0", f"{doubled:,}", doubled, 0)
    planned = f"{plan.dropped_images:,}"
    found = f"{dropped:,} of {whole.total():,}"
    yield Check("images", "images left out", planned, found, abs(dropped - plan.dropped_images), 0)


def _gradients(reference: Measurement, ranks: Sequence[Measurement], allowed: Tolerances) -> Iterator[Check]:
    first = ranks[0]
    steps = len(reference.losses)
    for step in range(1, steps + 1):
        name = f"gradient of step {step}"
        if step not in reference.gradients and step not in first.gradients:
            yield Check("gradients", name, "", "both skipped it for an overflow", 0.0, allowed.gradient)
            continue
        measured, worst = relative_difference(first.gradients.get(step, {}), reference.gradients.get(step, {}))
        yield _limited("gradients", name, measured, allowed.gradient, worst)
    losses = [_relative(*pair) for pair in zip(first.losses, reference.losses, strict=True)]
    shown = ", ".join(f"{loss:.6f}" for loss in first.losses)
    yield _limited("gradients", f"loss of steps 1 to {steps}", max(losses), allowed.loss, shown)
    kept, left_out = _trained(reference, allowed.gradient)
    distance = max(_moved_apart(reference, first, step, kept) for step in range(1, steps + 1))
    yield _limited("gradients", f"parameters after steps 1 to {steps}", distance, allowed.parameters, left_out)
    others = sum(rank.parameter_digests != first.parameter_digests for rank in ranks)
    yield Check("gradients", "ranks with other parameters", "0", f"{others} of {len(ranks)}", others, 0)


def _evaluation(reference: Measurement, ranks: Sequence[Measurement], allowed: Tolerances) -> Iterator[Check]:
    ours, theirs = torch.cat([rank.tested for rank in ranks]), reference.test_set
    common = min(len(ours), len(theirs))
    misplaced = int((ours[:common] != theirs[:common]).any(-1).sum()) + abs(len(ours) - len(theirs))
    yield Check(
        "evaluation", "images missing, doubled or misplaced", "0", f"{misplaced:,} of {len(theirs):,}", misplaced, 0
    )
    mine, its = ranks[0].evaluated, reference.evaluated
    wrong = max(abs(count - len(theirs)) for count in (mine.count, its.count))
    yield Check("evaluation", "images counted", f"{len(theirs):,}", f"{mine.count:,}", wrong, 0)
    shown = f"{mine.accuracy:.4f}, one rank {its.accuracy:.4f}"
    yield _limited("evaluation", "accuracy", abs(mine.accuracy - its.accuracy), allowed.accuracy, shown)
    shown = f"{mine.loss:.6f}, one rank {its.loss:.6f}"
    yield _limited("evaluation", "loss", _relative(mine.loss, its.loss), allowed.evaluation_loss, shown)


def _limited(subject: Subject, name: str, measured: float, tolerance: float, detail: str = "") -> Check:
    wanted = f"<= {tolerance:.2g}" if tolerance else "0"
    return Check(subject, name, wanted, f"{measured:.1e}" if measured else "0", measured, tolerance, detail)


def _trained(reference: Measurement, rounding: float) -> tuple[list[str], str]:
    """Tensors whose gradient exceeds a share ``rounding`` of the whole in some step, and a sentence on the others.

    For example, a bias before a batch norm has a zero gradient apart from rounding.
    """
    start, gradients = reference.parameters[0], reference.gradients.values()
    least = [rounding * _norm(step.values()) for step in gradients]
    kept = [
        name
        for name in start
        if any(name in step and _norm([step[name]]) > few for step, few in zip(gradients, least, strict=True))
    ]
    numbers = sum(value.numel() for name, value in start.items() if name not in kept)
    return kept, f"{numbers:,} parameters whose gradient is zero apart from rounding are left out" if numbers else ""


def _moved_apart(reference: Measurement, first: Measurement, step: int, names: Sequence[str]) -> float:
    """Distance between the parameters after a step / length of the reference's step."""
    before, after, ours = reference.parameters[step - 1], reference.parameters[step], first.parameters[step]
    moved = _norm(after[name] - before[name] for name in names)
    return _ratio(_norm(ours[name] - after[name] for name in names), moved)


def _norm(parts: Iterable[Tensor]) -> float:
    """The Euclidean norm over all values."""
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


def _difference(ours: Tensor, theirs: Tensor) -> Tensor:
    """The difference; zero for equal infinities and for two NaNs."""
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    return torch.where(same, 0.0, ours.double() - theirs.double())


def _relative(ours: float, theirs: float) -> float:
    return _ratio(abs(ours - theirs), abs(theirs))


def _ratio(difference: float, size: float) -> float:
    """The ratio, with 0 / 0 = 0."""
    if not difference:
        return 0.0
    return difference / size if size else math.inf


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """The images of all ranks, step by step: (steps, images, 32) each -> (steps, images of all ranks, 32)."""
    return torch.cat(list(parts), 1)


def _rows(digests: Tensor) -> list[bytes]:
    return [row.tobytes() for row in digests.reshape(-1, DIGEST_BYTES).numpy()]
