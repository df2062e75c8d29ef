"""What a GPU rank does in a captured step, on tensors that have a shape, a type and a device, but no numbers.

No GPU is needed (torch's FakeTensorMode): a step that mixes devices, reads a number on the host or copies from it fails
here as it would while a CUDA graph is captured. Backward passes need a real device: gradients are put in their place.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar_exp.training import trainer
from cifar_exp.training.cuda_graph import Function
from cifar_exp.training.metrics import MetricValues
from cifar_exp.worker.training_setup import TrainingSetup
from tests.helpers.fake_tensors import GPU, fake_rank, fake_tensors


class Crossings(TorchDispatchMode):
    """Counts operators, and those between two devices: copies, and numbers that the host reads.

    Args:
        allowed: whether there may be any, as there may not be in a CUDA graph.
    """

    def __init__(self, allowed: bool) -> None:
        super().__init__()
        self.allowed = allowed
        self.operators: Counter[str] = Counter()
        self.crossings = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operators[str(function.overloadpacket)] += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        copies = "copy" in str(function)  # other operators take numbers of the host's, which go along with the launch
        if len({tensor.device for tensor in tensors if tensor.ndim or copies}) > 1:
            assert self.allowed, f"{function} between devices"
            self.crossings += 1
        return result


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Fused updates, which need a real GPU, do nothing; yields those that were made."""
    updates: list[str] = []
    for name in ("_fused_sgd_", "_fused_adamw_"):
        monkeypatch.setattr(torch, name, lambda *_parameters, name=name, **_settings: updates.append(name))
    with fake_tensors(monkeypatch):
        yield updates


def rank_on_a_gpu(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str, images: int = 5000) -> TrainingSetup:
    return fake_rank(monkeypatch, folder, "gpu", *overrides, images=images)


RECIPES = ("experiment=reference", "optimizer=adamw", "experiment=speedrun", "experiment=speedrun94")


@pytest.mark.parametrize("recipe", RECIPES)
def test_captured_graph_covers_the_whole_step(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: list[str]
) -> None:
    captured: list[Crossings] = []

    def capture(step: Function) -> Function:
        step()  # what is made once, is made now
        gpu.clear()
        with Crossings(allowed=False) as seen:
            step()
        captured.append(seen)
        seen.operators["update"] = len(gpu)
        return step

    rank = rank_on_a_gpu(monkeypatch, tmp_path, recipe)
    rank.trainer.train_step.capture(rank.batches, capture)
    assert len(captured) == len({*rank.batches.scales, 1.0})
    trained = sum(parameter.requires_grad for parameter in rank.model.parameters())
    for seen in captured:
        assert seen.operators["aten.index_select"] > 1  # images are picked, and mirrored
        assert seen.operators["aten.convolution"] == sum(isinstance(it, nn.Conv2d) for it in rank.model.modules())
        assert "aten.adaptive_max_pool2d" not in seen.operators  # whose gradient train.deterministic=true refuses there
        assert seen.operators["update"] == 1 or seen.operators["aten.addcmul_"] == trained  # as Muon does
    rates = [group["lr"] for group in rank.trainer.train_step.optimizer.param_groups]
    assert {rate.device for rate in rates} == {GPU}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # as copying a network does
@pytest.mark.parametrize("recipe", [*RECIPES, "train.weight_averaging=0.9"])
@pytest.mark.usefixtures("gpu")
def test_the_host_does_not_wait_within_an_epoch(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "sum_over_ranks", lambda values: values)
    monkeypatch.setattr(MetricValues, "of", lambda _sums: MetricValues(1.0, 0.5, 100))

    def capture(step: Function) -> Function:
        step()
        return step

    steps, crossings = [], []
    for images in (5000, 10000):
        rank = rank_on_a_gpu(monkeypatch, tmp_path, recipe, "train.log_every=1000", images=images)
        rank.trainer.train_step.capture(rank.batches, capture)
        with Crossings(allowed=True) as seen:
            rank.trainer.train_one_epoch(1, rank.batches)
        steps.append(rank.trainer.step)
        crossings.append(seen.crossings)
    assert steps[1] > steps[0] > 1
    assert crossings == [2, 2]  # the order of the images, and how they are augmented


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        ([], (True, True)),
        (["train.compile=never"], (True, False)),
        (["+optimizer.capturable=false"], (True, False)),
        (["+optimizer.foreach=true"], (None, False)),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_optimizers_are_capturable_unless_disabled(
    overrides: list[str], settings: tuple[bool | None, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = rank_on_a_gpu(monkeypatch, tmp_path, "optimizer=adamw", *overrides)
    (group,) = rank.trainer.train_step.optimizer.param_groups
    assert (group["fused"], group["capturable"]) == settings


@pytest.mark.parametrize("what", [lambda: torch.ones(3).to(GPU), lambda: torch.ones(3, device=GPU).cpu()])
@pytest.mark.usefixtures("gpu")
def test_host_copies_are_detected(what: Callable[[], Tensor]) -> None:
    with Crossings(allowed=True) as seen:
        what()
    assert seen.crossings == 1
    with Crossings(allowed=False), pytest.raises(AssertionError, match="between devices"):
        what()


@pytest.mark.parametrize("what", [lambda values: values.sum().item(), lambda values: values.nonzero()])
@pytest.mark.usefixtures("gpu")
def test_host_reads_are_detected(what: Callable[[Tensor], object]) -> None:
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        what(torch.ones(3, device=GPU))
