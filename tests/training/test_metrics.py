"""Sums are exact and divided once; every second is counted under one name."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_exp.distributed.process_group import World
from cifar_exp.training import stopwatch
from cifar_exp.training.metrics import METRICS, MetricSums, MetricValues, completed
from cifar_exp.training.stopwatch import Stopwatch
from tests.helpers.tiny_training import train_batches, trainer, validation

CPU = torch.device("cpu")


class FakeClock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=fake.perf_counter))
    return fake


def test_totals_of_uneven_batches_equal_the_whole_set() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(33, 10, generator=generator), torch.arange(33) % 10
    metric_sums = MetricSums(CPU)
    for part in (slice(0, 16), slice(16, 32), slice(32, 33)):
        metric_sums.add(F.cross_entropy(logits[part], labels[part]), logits[part], labels[part])
    loss, correct, count = metric_sums.read_and_reset().tolist()
    assert loss / 33 == pytest.approx(float(F.cross_entropy(logits.double(), labels)), rel=1e-6)
    assert correct == sum(int(row.argmax()) == label for row, label in zip(logits, labels.tolist(), strict=True))
    assert count == 33


def test_totals_by_hand() -> None:
    metric_sums = MetricSums(CPU)
    metric_sums.add(torch.tensor(0.5), torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 2.0]]), torch.tensor([0, 0, 0]))
    metric_sums.add(torch.tensor(2.0), torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert metric_sums.read_and_reset().tolist() == [3.5, 3.0, 4.0]


def test_totals_start_again_at_zero_once_taken() -> None:
    metric_sums = MetricSums(CPU)
    metric_sums.add(torch.tensor(1.0), torch.eye(2), torch.tensor([0, 1]))
    taken = metric_sums.read_and_reset()
    assert metric_sums.read_and_reset().tolist() == [0, 0, 0]
    metric_sums.add(torch.tensor(3.0), torch.eye(2), torch.tensor([0, 1]))
    assert taken.tolist() == [2, 2, 2]
    assert metric_sums.read_and_reset().tolist() == [6, 2, 2]


def test_totals_add_up_small_losses_of_many_images_exactly() -> None:
    """In float32 the sum would stop growing at 2 ** 24 images."""
    metric_sums = MetricSums(CPU)
    metric_sums.sums += torch.tensor([2.0**24, 2.0**24, 2.0**24])
    metric_sums.add(torch.tensor(1.0), torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert metric_sums.read_and_reset().tolist() == [2**24 + 1] * 3


def test_averages_are_sums_over_images() -> None:
    averages = MetricValues.of(torch.tensor([30.0, 9.0, 12.0], dtype=torch.float64))
    assert averages == MetricValues(loss=2.5, accuracy=0.75, count=12)
    assert isinstance(averages.count, int)
    assert averages.named("val") == {"val/loss": 2.5, "val/accuracy": 0.75}


def test_nan_loss_stays_nan_in_the_average() -> None:
    metric_sums = MetricSums(CPU)
    metric_sums.add(torch.tensor(math.nan), torch.eye(2), torch.tensor([0, 1]))
    metric_sums.add(torch.tensor(1.0), torch.eye(2), torch.tensor([0, 1]))
    averages = MetricValues.of(metric_sums.read_and_reset())
    assert math.isnan(averages.loss)
    assert averages.accuracy == 1.0


def test_stopwatch_sums_spans_by_name_without_gaps(clock: FakeClock) -> None:
    watch = Stopwatch()
    for seconds in (2.0, 0.5):
        with watch.span("step"):
            clock.now += seconds
        clock.now += 40
    with watch.span("data"):
        clock.now += 1
    assert watch.seconds == {"step": 2.5, "data": 1.0}


def test_inner_span_is_subtracted_from_the_outer_one(clock: FakeClock) -> None:
    watch = Stopwatch()
    with watch.span("outer"):
        clock.now += 1
        with watch.span("inner"):
            clock.now += 10
            with watch.span("innermost"):
                clock.now += 100
            clock.now += 20
        clock.now += 2
        with watch.span("inner"):
            clock.now += 5
    assert watch.seconds == {"outer": 3.0, "inner": 35.0, "innermost": 100.0}
    assert sum(watch.seconds.values()) == clock.now - 100


def test_a_span_within_one_of_its_own_name_is_counted_once(clock: FakeClock) -> None:
    watch = Stopwatch()
    with watch.span("step"):
        clock.now += 1
        with watch.span("step"):
            clock.now += 2
        clock.now += 4
    assert watch.seconds == {"step": 7.0}


def test_span_ended_by_an_error_is_counted(clock: FakeClock) -> None:
    watch = Stopwatch()

    def fail() -> None:
        with watch.span("outer"), watch.span("inner"):
            clock.now += 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    clock.now += 50
    with watch.span("after"):
        clock.now += 1
    assert watch.seconds == {"inner": 3.0, "outer": 0.0, "after": 1.0}


def test_moved_seconds_change_their_name_and_not_their_sum() -> None:
    watch = Stopwatch({"step": 10.0})
    watch.move(4.0, "step", "communication")
    watch.move(0.5, "step", "communication")
    assert watch.seconds == {"step": 5.5, "communication": 4.5}


@pytest.fixture
def third_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric as a user would add it: top-2 accuracy."""

    def top2(mean_loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG001
        return (logits.topk(2).indices == labels[:, None]).any(1).sum()

    monkeypatch.setitem(METRICS, "top2_accuracy", top2)


@pytest.mark.usefixtures("third_metric")
def test_a_metric_of_the_table_is_in_the_journal_of_training_and_evaluation(only_rank: World) -> None:
    made, _, reports = trainer(only_rank)
    made.fit(train_batches(only_rank), validation(only_rank), epochs=1)
    reported = {name: value for _, _, metrics in reports for name, value in metrics.items()}
    for prefix in ("step", "train", "val"):
        assert reported[f"{prefix}/accuracy"] <= reported[f"{prefix}/top2_accuracy"] <= 1


@pytest.mark.usefixtures("third_metric")
def test_metric_missing_in_an_older_checkpoint_is_nan() -> None:
    sums = completed(torch.tensor([6.0, 2.0, 4.0], dtype=torch.float64))
    values = MetricValues.of(sums)
    assert (values.loss, values.accuracy, values.count) == (1.5, 0.5, 4)
    assert math.isnan(values.others["top2_accuracy"])
