"""N ranks train like one rank if a step skips parameters: those that no rank used are not updated."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifar_exp.distributed.data_parallel import data_parallel
from cifar_exp.distributed.process_group import World
from cifar_exp.models.build import seeded
from cifar_exp.models.networks import convnet
from tests.helpers.tiny_training import vector
from tests.helpers.user_code import Sometimes, Unused
from tests.helpers.worlds import results_of_ranks

NETWORKS = {"Unused": Unused, "Sometimes": Sometimes}
# Sometimes has one layer for bright images alone: of one rank, of none, of both.
BRIGHT = ((True, False), (False, False), (True, True))


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    noise = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(10 * step + rank))
    return (noise if BRIGHT[step][rank] else -noise), torch.arange(4)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """One that moves a parameter whose gradient is zero, but not one that has none."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def trained(world: World) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, kind in NETWORKS.items():
        model = seeded(kind, 10, seed=0)
        parallel, _ = data_parallel(model, world)
        optimizer = optimizer_of(model)
        for step in range(len(BRIGHT)):
            images, labels = batch(step, world.rank)
            F.cross_entropy(parallel(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        results[name] = vector(model.parameters())
    known, _ = data_parallel(convnet(num_classes=2, width=1, depth=1), world)
    marked, _ = data_parallel(convnet(num_classes=2, width=1, depth=1), world, has_unused=True)
    results["searches"] = [bool(one.find_unused_parameters) for one in (known, marked)]
    return results


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("pair")
    return results_of_ranks(trained, 2, folder)


@pytest.mark.parametrize("name", NETWORKS)
def test_two_ranks_train_as_one_that_accumulates(pair: list[dict[str, Any]], name: str) -> None:
    model = seeded(NETWORKS[name], 10, seed=0)
    optimizer = optimizer_of(model)
    for step in range(len(BRIGHT)):
        for rank in range(2):
            images, labels = batch(step, rank)
            (F.cross_entropy(model(images), labels) / 2).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert torch.equal(pair[0][name], pair[1][name])
    torch.testing.assert_close(pair[0][name], vector(model.parameters()))


def test_only_networks_with_unused_parameters_are_searched(pair: list[dict[str, Any]]) -> None:
    assert pair[0]["searches"] == [False, True]
