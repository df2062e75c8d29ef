"""Captured steps train the same network as eager steps. No GPU is needed: here a replay is a plain call."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from cifar_exp.data.batches import EvaluationBatches, TrainBatches
from cifar_exp.data.dataset_files import Split
from cifar_exp.distributed.process_group import World
from cifar_exp.training.cuda_graph import Capture, Function, capture_problem, cuda_graph
from cifar_exp.training.optimizers import OptimizerFactory
from tests.helpers.configs import muon
from tests.helpers.tiny_training import train_batches, trainer, validation

SGD = partial(torch.optim.SGD, momentum=0.9, weight_decay=1e-3)


def on_its_own_memory(parameters: list[Tensor]) -> Capture:
    """What a CUDA graph does to the outside: steps to warm up, then the same call on the same memory, gradients too."""

    def capture(function: Function) -> Function:
        for _ in range(3):
            function()
        own = [parameter.grad for parameter in parameters]

        def replay() -> None:
            bound = [parameter.grad for parameter in parameters]
            function()
            for parameter, mine, before in zip(parameters, own, bound, strict=True):
                assert mine is not None
                assert parameter.grad is not None
                mine.copy_(parameter.grad)
                parameter.grad = before

        return replay

    return capture


def trained(captured: bool, world: World, make_optimizer: OptimizerFactory) -> tuple[list[Tensor], list[object]]:
    made, model, reports = trainer(world)
    made.train_step.optimizer = make_optimizer(model.parameters(), lr=1.0)
    batches = train_batches(world)
    if captured:
        made.train_step.capture(batches, on_its_own_memory(list(model.parameters())))
    made.fit(batches, validation(world), epochs=1)
    figures = [
        (step, name, value) for step, _, metrics in reports for name, value in metrics.items() if "second" not in name
    ]
    return [*model.parameters(), *model.buffers()], figures


def test_steps_of_several_sizes_have_separate_gradients(only_rank: World) -> None:
    networks = []
    for captured in (False, True):
        made, model, _ = trainer(only_rank)
        made.train_step.optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, fused=False)
        batches = replace(train_batches(only_rank), scales=(0.5, 1.0))
        made.learning_rates = (0.1,) * 6
        if captured:
            made.train_step.capture(batches, on_its_own_memory(list(model.parameters())))
        made.fit(batches, validation(only_rank), epochs=2)
        networks.append([*model.parameters(), *model.buffers()])
    for ours, theirs in zip(*networks, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("fused", [True, False])
def test_replayed_steps_train_the_same_network(only_rank: World, fused: bool) -> None:
    one_by_one, expected = trained(False, only_rank, partial(SGD, fused=fused))
    replays, figures = trained(True, only_rank, partial(SGD, fused=fused))
    assert figures == expected
    assert len(figures) > 10
    for ours, theirs in zip(replays, one_by_one, strict=True):
        assert torch.equal(ours, theirs)


def test_replayed_steps_of_muon_train_the_same_network(only_rank: World) -> None:
    """But for rounding: a rate that is on the device is multiplied by what it is the rate of, not fused."""
    one_by_one, _ = trained(False, only_rank, muon())
    replays, _ = trained(True, only_rank, muon())
    for ours, theirs in zip(replays, one_by_one, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_failed_capture_is_reported_and_training_runs_eagerly(only_rank: World) -> None:
    def refusing(function: Function) -> Function:
        function()
        raise ValueError("not this one")

    expected, _ = trained(False, only_rank, SGD)
    made, model, _ = trainer(only_rank)
    before = [value.clone() for value in model.state_dict().values()]
    made.train_step.optimizer = SGD(model.parameters(), lr=1.0, fused=True)
    with pytest.raises(RuntimeError, match="not this one"):
        made.train_step.capture(train_batches(only_rank), refusing)
    for value, old in zip(model.state_dict().values(), before, strict=True):
        assert torch.equal(value, old)
    made.fit(train_batches(only_rank), validation(only_rank), epochs=1)
    for ours, theirs in zip([*model.parameters(), *model.buffers()], expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: a CUDA graph needs a GPU")
@pytest.mark.parametrize("make_optimizer", [partial(SGD, fused=True), partial(SGD, fused=False), muon()])
def test_a_cuda_graph_trains_the_same_network(only_rank: World, make_optimizer: OptimizerFactory) -> None:
    """Six steps of two sizes, images and evaluation on the GPU."""
    networks = []
    for captured in (False, True):
        made, model, _ = trainer(only_rank)
        optimizer = make_optimizer(model.to("cuda").parameters(), lr=1.0)
        step = replace(made.train_step, optimizer=optimizer)
        made = replace(made, train_step=step, learning_rates=(0.1,) * 6)
        batches, test = train_batches(only_rank), validation(only_rank)
        batches = replace(batches, source=images_on_gpu(batches), scales=(0.5, 1.0))
        if captured:
            made.train_step.capture(batches, cuda_graph)
        made.fit(batches, replace(test, source=images_on_gpu(test)), epochs=2)
        networks.append([*model.parameters(), *model.buffers()])
    for ours, theirs in zip(*networks, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def images_on_gpu(batches: TrainBatches | EvaluationBatches) -> Split:
    assert isinstance(batches.source, Split)
    return batches.source.to(torch.device("cuda"))


def test_cause_of_a_failed_capture_is_reported_first() -> None:
    """CUDA raises its own error when the capture ends, which hides the cause."""

    def capture() -> None:
        try:
            raise ValueError("the host reads a number")
        finally:
            raise RuntimeError("a previous error")

    with pytest.raises(RuntimeError) as raised:
        capture()
    assert capture_problem(raised.value) == "the host reads a number; then a previous error"
    assert capture_problem(MemoryError()) == "MemoryError"


def test_ema_weights_follow_the_formula_and_are_evaluated(only_rank: World) -> None:
    made, model, _ = trainer(only_rank)
    made = replace(made, train_step=replace(made.train_step, ema_decay=0.75))
    seen: list[Tensor] = []
    weight = next(model.parameters())
    made.after_step = lambda: seen.append(weight.detach().clone())
    made.fit(train_batches(only_rank), validation(only_rank), epochs=1)
    assert len(seen) == 3
    expected = seen[0]
    for value in seen[1:]:
        expected = 0.75 * expected + 0.25 * value
    averaged = next(made.evaluated.parameters())
    torch.testing.assert_close(averaged, expected)
    assert not torch.equal(averaged, weight)

    state = made.state_dict()
    again, _, _ = trainer(only_rank)
    again = replace(again, train_step=replace(again.train_step, ema_decay=0.75))
    again.load_state_dict(state, same_run=True)
    assert torch.equal(next(again.evaluated.parameters()), averaged)
