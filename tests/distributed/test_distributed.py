"""N ranks train like one rank: gradients, sums, statistics, failures. Real gloo processes."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from cifar_exp.data.batches import EvaluationBatches, Normalization
from cifar_exp.distributed.collectives import average_buffers, sum_over_ranks
from cifar_exp.distributed.data_parallel import Communication, data_parallel
from cifar_exp.distributed.link_speed import link_bytes_per_second
from cifar_exp.distributed.process_group import World
from cifar_exp.distributed.rank_times import RankTimes
from cifar_exp.errors import DivergenceError
from cifar_exp.training.evaluation import evaluate
from cifar_exp.training.metrics import MetricValues
from tests.helpers.tiny_training import (
    LR,
    NORMALIZATION,
    floating_buffers,
    gradient_of,
    images,
    tiny_model,
    train_batches,
    trainer,
    validation,
    vector,
)
from tests.helpers.worlds import results_of_ranks, world_of_one

Results = dict[str, Any]


def micro_batch(rank: int) -> tuple[Tensor, Tensor]:
    split = images(32, seed=5)
    mine = slice(16 * rank, 16 * rank + 16)
    return NORMALIZATION(split.images[mine]), split.labels[mine]


def accumulated_gradients(rank_count: int) -> Tensor:
    """Gradients that one process accumulates over the ranks' micro-batches, each with its own batch statistics."""
    model = tiny_model()
    for rank in range(rank_count):
        inputs, labels = micro_batch(rank)
        (F.cross_entropy(model(inputs), labels) / rank_count).backward()
    return gradient_of(model)


def gradients(world: World) -> Results:
    """Gradients of one backward pass over this rank's micro-batch.

    What they should be is computed in the same process: with another number of threads, sums are rounded otherwise,
    and a ReLU whose input is zero but for that may open or close.
    """
    model = tiny_model()
    parallel, exposed = data_parallel(model, world)
    inputs, labels = micro_batch(world.rank)
    F.cross_entropy(parallel(inputs), labels).backward()
    exposed.backward_done()
    return {
        "gradients": gradient_of(model),
        "accumulated_gradients": accumulated_gradients(world.size),
        "exposed_seconds": exposed.take()[0],
        "wrapped": parallel is not model,
    }


def evaluated(world: World, count: int) -> MetricValues:
    batches = EvaluationBatches(images(count, seed=6), NORMALIZATION, world.rank, world.size, batch_size=5)
    return evaluate(tiny_model(), batches, torch.float32)


def averaged(world: World) -> Results:
    """Buffers filled with the rank plus their index, before and after averaging."""
    model = tiny_model()
    for place, buffer in enumerate(floating_buffers(model)):
        buffer.fill_(10 * place + world.rank)
    counters = [buffer for buffer in model.buffers() if not buffer.is_floating_point()]
    for counter in counters:
        counter.fill_(world.rank)
    average_buffers(model)
    return {
        "buffers": [buffer.unique().tolist() for buffer in floating_buffers(model)],
        "counters": [int(counter) for counter in counters],
    }


def trained(world: World, accumulate: int = 1) -> Results:
    """One epoch of three steps."""
    made, model, reports = trainer(world)
    final = made.fit(train_batches(world, accumulate=accumulate), validation(world), epochs=1)
    return {
        "parameters": vector(model.parameters()),
        "buffers": vector(floating_buffers(model)),
        "reports": reports,
        "final": vars(final),
        "seconds": made.stopwatch.seconds,
        "steps": made.step,
    }


def slowed_down(world: World) -> RankTimes:
    """The same epoch, but before steps 2 and 3 the last rank pauses until the first rank waits for it."""
    made, model, _ = trainer(world)
    if world.size > 1:
        messages = dist.new_group(backend="gloo")
        sent: list[dist.Work | None] = []

        def tell(_parameter: Tensor) -> None:
            if made.step > 0:  # the second step, or the third
                sent.append(dist.isend(torch.zeros(1), world.size - 1, messages))

        def listen() -> None:
            if made.step < len(made.learning_rates):
                dist.recv(torch.zeros(1), 0, messages)
                time.sleep(0.5)

        if world.is_first:
            next(model.parameters()).register_post_accumulate_grad_hook(tell)  # its gradient is the last one
        elif world.rank == world.size - 1:
            made.after_step = listen
    batches = train_batches(world)
    # Else DDP has ranks agree on buckets before the second step.
    made.train_step.dry_run(*batches.make(*next(batches.micro_batches(1))))
    made.fit(batches, validation(world), epochs=1)
    return made.rank_times


def plain_loop(rank_count: int) -> tuple[Tensor, list[float]]:
    """The three steps in bare PyTorch, in one process: parameters, and each step's mean loss over the ranks."""
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    parts = [train_batches(World(rank, rank_count, torch.device("cpu"))).epoch(1) for rank in range(rank_count)]
    losses = []
    for step, batches in enumerate(zip(*parts, strict=True)):
        optimizer.param_groups[0]["lr"] = LR / 2**step
        optimizer.zero_grad()
        losses.append(0.0)
        for inputs, labels in batches:
            loss = F.cross_entropy(model(inputs), labels) / rank_count
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
    return vector(model.parameters()), losses


def accumulated_after_warming_up(world: World) -> dict[str, list[float]]:
    """Seconds of the ranks where DDP has chosen its buckets before, and steps have two micro-batches."""
    made, _, _ = trainer(world)
    batches = train_batches(world, accumulate=2)
    made.train_step.dry_run(*batches.make(*next(batches.micro_batches(1))))
    time.sleep(1.0)
    made.fit(batches, validation(world), epochs=1)
    assert sum(made.rank_times.last) == 3
    return made.rank_times.seconds


def collectives(world: World) -> int:
    """Number of collectives for 3 MB of gradients, which torch's default bucket size would split."""
    count = 0

    def complete(self: Communication) -> None:
        nonlocal count
        count += 1
        before(self)

    model = nn.Sequential(*[nn.Linear(500, 500) for _ in range(3)])
    parallel, _ = data_parallel(model, world)
    with pytest.MonkeyPatch.context() as patch:
        before = Communication.bucket_complete
        patch.setattr(Communication, "bucket_complete", complete)
        for _ in range(3):
            count = 0
            parallel(torch.ones(2, 500)).sum().backward()
    return count


def scheduling_policies() -> tuple[int, set[int]]:
    """The policy of the training thread, and the policies of all other threads."""
    trains = threading.get_native_id()
    others = {int(path.name) for path in Path("/proc/self/task").iterdir()} - {trains}
    return os.sched_getscheduler(trains), {os.sched_getscheduler(thread) for thread in others}


def divergence(world: World, log_every: int) -> str:
    """The error if only the last rank's images are not finite."""
    broken = Normalization(shift=(float("nan"), 0.0, 0.0)) if world.rank == world.size - 1 else NORMALIZATION
    made, _, _ = trainer(world, log_every)
    try:
        made.fit(train_batches(world, broken), validation(world), epochs=1)
    except DivergenceError as error:
        return str(error)
    return "nothing was raised"


def all_results(world: World) -> Results:
    return {
        "world": (world.rank, world.size, world.is_first, str(world.device)),
        "sum": sum_over_ranks(torch.tensor([1.0 + world.rank, 10.0], dtype=torch.float64)).tolist(),
        **gradients(world),
        "evaluated": vars(evaluated(world, 33)),
        "fewer_images_than_ranks": vars(evaluated(world, 1)),
        "averaged": averaged(world),
        "trained": trained(world),
        "accumulated": {parts: trained(world, parts) for parts in (2, 4)},
        "slowed_down": vars(slowed_down(world)),
        "warmed_up": accumulated_after_warming_up(world) if world.size > 1 else None,
        "collectives": collectives(world),
        "policies": scheduling_policies(),
        "link": link_bytes_per_second(1000, world.device),
        "plain_loop": plain_loop(world.size),
        "diverged": {log_every: divergence(world, log_every) for log_every in (1, 2, 10)},
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """The results of two ranks."""
    return results_of_ranks(all_results, 2, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of a world of one, through the same calls."""
    with world_of_one(tmp_path_factory.mktemp("alone")) as world:
        results = all_results(world)
    assert not dist.is_initialized()
    return results


def test_each_rank_knows_its_rank_and_world_size(pair: list[Results], alone: Results) -> None:
    assert [rank["world"] for rank in pair] == [(0, 2, True, "cpu"), (1, 2, False, "cpu")]
    assert alone["world"] == (0, 1, True, "cpu")


def test_sums_are_over_all_ranks(pair: list[Results], alone: Results) -> None:
    assert [rank["sum"] for rank in pair] == [[3.0, 20.0]] * 2
    assert alone["sum"] == [1.0, 10.0]


def test_gradients_are_the_mean_of_the_ranks_micro_batches(pair: list[Results]) -> None:
    """Equal to the gradients that one process accumulates over both; the same on both ranks, bit for bit."""
    for rank in pair:
        expected = rank["accumulated_gradients"]
        assert expected.norm() > 0.1
        assert (rank["gradients"] - expected).norm() / expected.norm() < 1e-5
    assert torch.equal(pair[0]["gradients"], pair[1]["gradients"])


def test_the_wait_for_gradients_is_measured(pair: list[Results], alone: Results) -> None:
    for rank in pair:
        (seconds,) = rank["exposed_seconds"]
        assert 0 < seconds < 30
    assert all(0 < rank["trained"]["seconds"]["communication"] < 30 for rank in pair)
    assert alone["exposed_seconds"] == []
    assert alone["trained"]["seconds"]["communication"] == 0


def test_all_ranks_know_the_slowest_rank(pair: list[Results], alone: Results) -> None:
    times = pair[0]["slowed_down"]
    assert times == pair[1]["slowed_down"]
    assert times["last"][1] >= 2  # it paused before the second and the third step
    assert times["seconds"]["waiting"][0] > times["seconds"]["waiting"][1] + 0.2
    assert times["seconds"]["communication"][0] == times["seconds"]["communication"][1] > 0
    assert all(value > 0 for name in ("compute", "data", "evaluation") for value in times["seconds"][name])
    assert set(alone["slowed_down"]["seconds"]["waiting"]) == {0.0}
    assert all(rank["link"] > 1e3 for rank in pair)


def test_ranks_on_cpus_average_all_gradients_at_once(pair: list[Results], alone: Results) -> None:
    assert [rank["collectives"] for rank in (*pair, alone)] == [1, 1, 0]


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="NOT RUN: Linux alone has this policy")
def test_gloos_threads_do_not_preempt_training(pair: list[Results]) -> None:
    for rank in pair:
        trains, others = rank["policies"]
        assert trains == os.SCHED_OTHER
        assert os.SCHED_BATCH in others


def test_gradients_are_all_reduced_once_per_step(pair: list[Results]) -> None:
    """Time before the first step, such as the choice of buckets, is not counted as waiting."""
    seconds = pair[0]["warmed_up"]
    assert all(seconds["compute"][rank] > 0 for rank in range(2))
    assert seconds["communication"][0] < 1.0


@pytest.mark.parametrize(("key", "count"), [("evaluated", 33), ("fewer_images_than_ranks", 1)])
def test_every_image_is_evaluated_once_whatever_the_number_of_ranks(
    pair: list[Results], alone: Results, key: str, count: int
) -> None:
    split = images(count, seed=6)
    with torch.no_grad():
        logits = tiny_model().eval()(NORMALIZATION(split.images))
    loss = float(F.cross_entropy(logits, split.labels))
    correct = int((logits.argmax(1) == split.labels).sum())
    for rank in (*pair, alone):
        assert rank[key]["count"] == count
        assert rank[key]["loss"] == pytest.approx(loss, rel=1e-5)
        assert rank[key]["accuracy"] == correct / count
    if count == 33:
        assert 0 < correct < count


def test_buffers_become_the_mean_over_ranks(pair: list[Results], alone: Results) -> None:
    """Running means and variances, each by itself; counters of batches stay the rank's own."""
    for rank, results in enumerate(pair):
        assert results["averaged"]["buffers"] == [[10 * place + 0.5] for place in range(6)]
        assert results["averaged"]["counters"] == [rank] * 3
    assert alone["averaged"]["buffers"] == [[10.0 * place] for place in range(6)]


def test_networks_are_the_same_on_both_ranks_after_three_steps(pair: list[Results]) -> None:
    first, second = (rank["trained"] for rank in pair)
    assert first["steps"] == second["steps"] == 3
    assert torch.equal(first["parameters"], second["parameters"])
    assert torch.equal(first["buffers"], second["buffers"])
    assert (first["parameters"] - vector(tiny_model().parameters())).norm() > 0.01


def test_training_equals_a_plain_loop_and_loss_is_over_all_ranks(pair: list[Results], alone: Results) -> None:
    """Parameters after three steps with their own rates; the loss of a step and of the epoch, not rank 0's."""
    start = vector(tiny_model().parameters())
    for rank in (*pair, alone):
        parameters, losses = rank["plain_loop"]
        assert (rank["trained"]["parameters"] - parameters).norm() < 0.01 * (parameters - start).norm()
        *steps, (last_step, last_epoch, metrics) = rank["trained"]["reports"]
        assert [(step, epoch) for step, epoch, _ in steps] == [(1, 1), (2, 1), (3, 1)]
        assert [point["step/loss"] for _, _, point in steps] == pytest.approx(losses, rel=1e-3)
        assert steps[0][2]["step/loss"] == pytest.approx(losses[0], rel=1e-6)
        assert [point["lr"] for _, _, point in steps[:2]] == [LR, LR / 2]  # the last is the epoch's
        assert (last_step, last_epoch) == (3, 1)
        assert metrics["train/loss"] == pytest.approx(sum(losses) / 3, rel=1e-3)
        correct = 16 * sum(point["step/accuracy"] for _, _, point in steps)
        assert metrics["train/accuracy"] * 48 == pytest.approx(correct)


def test_accumulation_equals_more_devices(pair: list[Results], alone: Results) -> None:
    """Two micro-batches on one rank, two ranks; four on one, two on each of two: the same images, losses and steps."""
    start = vector(tiny_model().parameters())
    for one, several in (
        (alone["accumulated"][2], pair[0]["trained"]),
        (alone["accumulated"][4], pair[0]["accumulated"][2]),
    ):
        way = (several["parameters"] - start).norm()
        assert (one["parameters"] - several["parameters"]).norm() < 1e-5 * way
        assert one["steps"] == several["steps"] == 3
        for name in ("step/loss", "step/accuracy"):
            mine, theirs = ([m[name] for _, _, m in result["reports"][:3]] for result in (one, several))
            assert mine == pytest.approx(theirs, rel=1e-5)
    # Not what one rank makes of the whole batch: batch norm sees the micro-batch.
    assert (alone["trained"]["parameters"] - alone["accumulated"][2]["parameters"]).norm() > 1e-3 * way


def test_metrics_of_an_epoch(pair: list[Results], alone: Results) -> None:
    """Every metric that the contract promises, with validation after the epoch."""
    for rank in (*pair, alone):
        metrics, final = rank["trained"]["reports"][-1][2], rank["trained"]["final"]
        assert set(metrics) == {
            "train/loss",
            "train/accuracy",
            "val/loss",
            "val/accuracy",
            "lr",
            "epoch",
            "images_per_second",
            "time/epoch_seconds",
        }
        assert (metrics["lr"], metrics["epoch"]) == (LR / 4, 1)
        assert metrics["images_per_second"] * metrics["time/epoch_seconds"] == pytest.approx(48)
        assert (metrics["val/loss"], metrics["val/accuracy"], 9) == (final["loss"], final["accuracy"], final["count"])
    assert pair[0]["trained"]["final"] == pair[1]["trained"]["final"]


@pytest.mark.parametrize(("log_every", "step"), [(1, 1), (2, 2), (10, 3)])
def test_non_finite_loss_on_one_rank_ends_all_ranks(
    pair: list[Results], alone: Results, log_every: int, step: int
) -> None:
    """All ranks end at the next read of the loss, also at an epoch's end; the message names step and remedy."""
    for rank in (*pair, alone):
        message = rank["diverged"][log_every]
        assert f"the loss is nan by step {step} (epoch 1)" in message
        assert "optimizer.lr=<smaller>" in message


def test_one_rank_uses_no_ddp_wrapper(pair: list[Results], alone: Results) -> None:
    """The wrapper would copy gradients needlessly."""
    assert [rank["wrapped"] for rank in (*pair, alone)] == [True, True, False]


def test_process_group_is_destroyed_on_error(tmp_path: Path) -> None:
    def fail() -> None:
        with world_of_one(tmp_path):
            assert dist.is_initialized()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not dist.is_initialized()
