"""Batch-norm statistics cover the images of all ranks, for each choice of train.batch_norm. Real gloo processes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifar_exp.config.schema import BatchNorm
from cifar_exp.distributed import batch_norm
from cifar_exp.distributed.batch_norm import SynchronizedBatchNorm
from cifar_exp.distributed.data_parallel import data_parallel
from cifar_exp.distributed.process_group import World
from cifar_exp.records import journal
from tests.conftest import TINY, Command
from tests.helpers.tiny_training import (
    floating_buffers,
    gradient_of,
    tiny_model,
    train_batches,
    trainer,
    validation,
    vector,
)
from tests.helpers.worlds import results_of_ranks, world_of_one

Results = dict[str, Any]
RANKS = 2


def rank_images(rank: int) -> Tensor:
    """The images of each rank are brighter than the previous rank's, so that the ranks' means differ widely."""
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(rank)) * (1 + rank) + 5 * rank


def after_one_batch(images: Tensor) -> nn.BatchNorm2d:
    """A layer whose running statistics equal the batch's."""
    layer = nn.BatchNorm2d(3, momentum=1.0)
    layer(images)
    return layer


def settled(world: World, choice: BatchNorm) -> Tensor:
    layer = after_one_batch(rank_images(world.rank))
    batch_norm.combine_over_ranks(layer, choice)
    return vector(floating_buffers(layer))


def one_layer(layer: nn.Module, images: Tensor, rank: int | None) -> Results:
    """Output, and the gradients of a loss that is the mean over ranks, of ``rank``'s images or all of them."""
    inputs = images.clone().requires_grad_()
    outputs = layer(inputs)
    weights = torch.arange(RANKS * 4.0).view(-1, 1, 1, 1)  # of the images, or normalising would hide the gradient
    mine = weights if rank is None else weights[4 * rank : 4 * rank + 4]
    (outputs.square() * mine).mean().backward()
    share = 1 if rank is None else 1 / RANKS  # the loss over all ranks is the mean of theirs
    assert inputs.grad is not None
    return {
        "outputs": outputs.detach(),
        "inputs": inputs.grad * share,
        "parameters": gradient_of(layer),
        "running": vector(floating_buffers(layer)),
    }


def scaled_layer() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        layer.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    return layer


def synchronized_network(world: World) -> Results:
    """A step of the whole network under DDP, synchronised."""
    model = batch_norm.synchronize_layers(tiny_model(), world.device)
    kinds = [type(layer).__name__ for layer in batch_norm.batch_norms(model)]
    parallel, _ = data_parallel(model, world)
    (images, labels), *_ = train_batches(world).epoch(1)
    F.cross_entropy(parallel(images), labels).backward()
    return {"gradients": gradient_of(model), "kinds": kinds, "names": list(model.state_dict())}


def counted(model: nn.Module) -> list[int]:
    """Batches that the running statistics have seen."""
    return [int(buffer) for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]


def population(world: World, parts: int = 1) -> Results:
    """Statistics recomputed over an epoch's batches, and what is left of the network's modes."""
    model = tiny_model()
    before = [layer.momentum for layer in batch_norm.batch_norms(model)]
    batches = train_batches(world, accumulate=parts)
    model.train()
    batch_norm.recompute(model, (batches.make(*micro_batch)[0] for micro_batch in batches.covering(1)))
    assert [layer.momentum for layer in batch_norm.batch_norms(model)] == before
    assert all(module.training for module in model.modules())
    assert counted(model) == counted(tiny_model())
    assert not any(layer._forward_pre_hooks for layer in batch_norm.batch_norms(model))
    return {"buffers": vector(floating_buffers(model)), "parameters": vector(model.parameters())}


def trained(world: World, choice: BatchNorm, parts: int = 1) -> Results:
    """An epoch of three steps."""
    made, model, _ = trainer(world)
    made = replace(made, batch_norm=choice)
    final = made.fit(train_batches(world, accumulate=parts), validation(world), epochs=1)
    assert final
    return {"buffers": vector(floating_buffers(model)), "loss": final.loss}


def all_results(world: World) -> Results:
    return {
        "settled": {choice: settled(world, choice) for choice in ("averaged", "local")},
        "layer": one_layer(SynchronizedBatchNorm.of(scaled_layer()), rank_images(world.rank), world.rank),
        "network": synchronized_network(world),
        "population": population(world, RANKS // world.size),
        "trained": {
            choice: trained(world, choice, RANKS // world.size) for choice in ("averaged", "local", "population")
        },
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return results_of_ranks(all_results, RANKS, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """One rank that accumulates both ranks' micro-batches."""
    with world_of_one(tmp_path_factory.mktemp("alone")) as world:
        return all_results(world)


def test_averaged_statistics_equal_one_rank_on_all_images(pair: list[Results]) -> None:
    """Mean and variance alike; an average of the variances alone would be four times too small here."""
    whole = vector(floating_buffers(after_one_batch(torch.cat([rank_images(rank) for rank in range(RANKS)]))))
    for rank in pair:
        torch.testing.assert_close(rank["settled"]["averaged"], whole, rtol=1 / (4 * 36), atol=1e-5)
    variances = [after_one_batch(rank_images(rank)).running_var for rank in range(RANKS)]
    assert (whole[3:] / torch.stack([v for v in variances if v is not None]).mean(0)).min() > 2


def test_statistics_of_several_ranks_are_merged_on_resume() -> None:
    """Resume within an epoch on another number of ranks: variances are pooled. Those of a single rank are unchanged."""
    layers = [after_one_batch(rank_images(rank)) for rank in range(RANKS)]
    whole = vector(floating_buffers(after_one_batch(torch.cat([rank_images(rank) for rank in range(RANKS)]))))
    for ranks, expected in ((layers, whole), (layers[:1], vector(floating_buffers(layers[0])))):
        network = nn.Sequential(nn.BatchNorm2d(3))
        batch_norm.load_combined(network, [list(layer.buffers()) for layer in ranks])
        torch.testing.assert_close(vector(floating_buffers(network)), expected, rtol=1 / (4 * 36), atol=1e-5)


def test_local_statistics_are_those_of_rank_0(pair: list[Results], alone: Results) -> None:
    expected = vector(floating_buffers(after_one_batch(rank_images(0))))
    for rank in (*pair, alone):
        assert torch.equal(rank["settled"]["local"], expected)


def test_a_synchronized_layer_computes_what_one_rank_computes_of_all_images(pair: list[Results]) -> None:
    """Outputs, gradients of inputs and parameters, and running statistics."""
    whole = one_layer(scaled_layer(), torch.cat([rank_images(rank) for rank in range(RANKS)]), None)
    for name in ("outputs", "inputs"):
        torch.testing.assert_close(torch.cat([rank["layer"][name] for rank in pair]), whole[name], rtol=1e-4, atol=1e-5)
    mean = torch.stack([rank["layer"]["parameters"] for rank in pair]).mean(0)  # as DDP averages them
    torch.testing.assert_close(mean, whole["parameters"], rtol=1e-5, atol=1e-5)
    for rank in pair:
        torch.testing.assert_close(rank["layer"]["running"], whole["running"], rtol=1e-5, atol=1e-5)


def test_a_synchronized_network_has_the_gradients_of_one_rank_with_the_whole_batch(
    pair: list[Results], alone: Results
) -> None:
    expected = alone["network"]["gradients"]
    assert expected.norm() > 0.1
    for rank in pair:
        assert (rank["network"]["gradients"] - expected).norm() / expected.norm() < 1e-5
        assert set(rank["network"]["kinds"]) == {"SynchronizedBatchNorm"}
        assert rank["network"]["names"] == list(tiny_model().state_dict())


def test_population_statistics_are_those_of_all_training_images_on_any_number_of_ranks(
    pair: list[Results], alone: Results
) -> None:
    ours = alone["population"]["buffers"]
    for rank in pair:
        torch.testing.assert_close(rank["population"]["buffers"], ours, rtol=1e-5, atol=1e-5)
    assert torch.equal(alone["population"]["parameters"], vector(tiny_model().parameters()))
    # The first layer's inputs do not depend on other statistics, so that they can be put together and looked at.
    model = tiny_model()
    batches = train_batches(World(0, 1, torch.device("cpu")))
    images = torch.cat([batches.make(*micro_batch)[0] for micro_batch in batches.covering(1)])
    assert len(images) == 50  # two of them are in no step
    inputs = model[0](images).double()
    variance, mean = torch.var_mean(inputs, (0, 2, 3))
    torch.testing.assert_close(ours[: len(mean)].double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[len(mean) : 2 * len(mean)].double(), variance, rtol=1e-5, atol=1e-6)


def test_layer_without_input_keeps_its_statistics(only_rank: World) -> None:  # noqa: ARG001
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = after_one_batch(rank_images(0)), after_one_batch(rank_images(0))

        def forward(self, images: Tensor) -> Tensor:
            return self.used(images)

    model = Half()
    before = vector(floating_buffers(model.unused)).clone()
    batch_norm.recompute(model, [rank_images(1)])
    assert torch.equal(vector(floating_buffers(model.unused)), before)
    expected = vector(floating_buffers(after_one_batch(rank_images(1))))
    torch.testing.assert_close(vector(floating_buffers(model.used)), expected)


def test_without_a_batch_the_statistics_stay(only_rank: World) -> None:  # noqa: ARG001
    layer = after_one_batch(rank_images(1))
    before = vector(floating_buffers(layer)).clone()
    batch_norm.recompute(nn.Sequential(layer), [])
    assert torch.equal(vector(floating_buffers(layer)), before)


def test_training_evaluates_with_the_chosen_statistics(pair: list[Results], alone: Results) -> None:
    """The same on both ranks; recomputed ones are those of one rank, too; the choices differ."""
    first, second = (rank["trained"] for rank in pair)
    for choice in ("averaged", "local", "population"):
        assert torch.equal(first[choice]["buffers"], second[choice]["buffers"])
        assert first[choice]["loss"] == second[choice]["loss"]
    assert len({first[choice]["loss"] for choice in first}) == 3
    recomputed = alone["trained"]["population"]
    torch.testing.assert_close(first["population"]["buffers"], recomputed["buffers"], rtol=1e-4, atol=1e-5)
    assert first["population"]["loss"] == pytest.approx(recomputed["loss"], rel=1e-4)


def test_synchronized_ranks_that_share_a_batch_train_as_one_rank(cifar_exp: Command, workplace: Path) -> None:
    """The same loss at each of six steps, to rounding, and the same figures at the end."""
    shared = (*TINY, "train.scaling=strong", "train.precision=fp32", "tracking=none", "progress=quiet")
    two = ("devices.count=2", "devices.oversubscribe=true", "train.batch_norm=synchronized")
    losses = []
    for run, devices in (("one", ("devices.count=1",)), ("two", two)):
        done = cifar_exp(*shared, *devices, f"hydra.run.dir={run}")
        assert done.returncode == 0, done.stderr
        entries = journal.read(workplace / run)
        losses.append([entry.metrics["step/loss"] for entry in entries if "step/loss" in entry.metrics])
        losses[-1].append(journal.last_values(workplace / run)["test/loss"])
    assert len(losses[0]) == 7
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("choice", ["local", "population"])
def test_a_run_is_evaluated_with_the_chosen_statistics(cifar_exp: Command, workplace: Path, choice: str) -> None:
    """The same weights, other statistics: no step depends on them."""
    shared = (
        *TINY,
        "devices.count=2",
        "devices.oversubscribe=true",
        "train.precision=fp32",
        "train.deterministic=true",
    )
    figures = []
    for run in ("averaged", choice):
        done = cifar_exp(*shared, f"train.batch_norm={run}", f"hydra.run.dir={run}", "tracking=none", "progress=quiet")
        assert done.returncode == 0, done.stderr
        figures.append(journal.last_values(workplace / run))
    assert figures[0]["train/loss"] == figures[1]["train/loss"]
    assert figures[0]["test/loss"] != figures[1]["test/loss"]


def test_micro_batches_cannot_be_synchronized(cifar_exp: Command) -> None:
    refused = cifar_exp(*TINY, "train.batch_norm=synchronized", "train.accumulate=2", "tracking=none")
    assert refused.returncode == 2
    assert "Set train.accumulate=1, or train.batch_norm=averaged" in refused.stderr


def test_unknown_batch_norm_choice_is_refused(cifar_exp: Callable[..., Any]) -> None:
    refused = cifar_exp("train.batch_norm=synced")
    assert refused.returncode == 2
    assert "train.batch_norm=synced: it must be averaged, local, synchronized or population" in refused.stderr
