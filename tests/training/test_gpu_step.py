"""What a GPU rank does in a captured step, on tensors that have a shape, a type and a device, but no numbers.

No GPU is needed (torch's FakeTensorMode): a step that mixes devices, reads a number on the host or copies from it fails
here as it would while a CUDA graph is captured. Backward passes need a real device: gradients are put in their place.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.optim import swa_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar_exp.config.reading import read_config
from cifar_exp.data.batches import constant_images
from cifar_exp.data.dataset_files import DatasetFiles, Split
from cifar_exp.distributed.process_group import World
from cifar_exp.distributed.rank_control import RankControl
from cifar_exp.launch.devices import DeviceSet
from cifar_exp.runs.components import build
from cifar_exp.runs.job_setup import new_job
from cifar_exp.training import trainer
from cifar_exp.training.cuda_graph import Function
from cifar_exp.training.metrics import MetricValues
from cifar_exp.training.plan import make_plan
from cifar_exp.worker.training_setup import TrainingSetup, build_training_setup
from tests.helpers.configs import composed

GPU = torch.device("cuda", 0)
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)


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
    """One that multiplies bfloat16. Fused updates, which need a real one, do nothing; yields those that were made."""
    updates: list[str] = []
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(nn.Module, "_apply", _moved)
    for name in ("_fused_sgd_", "_fused_adamw_"):
        monkeypatch.setattr(torch, name, lambda *_parameters, name=name, **_settings: updates.append(name))
    constant_images.cache_clear()
    with FakeTensorMode() as mode:
        monkeypatch.setattr(swa_utils, "deepcopy", lambda model: deepcopy(model, {id(mode): mode}))
        yield updates
    constant_images.cache_clear()


def _moved(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Torch would put the new values into the old tensors, which those without numbers do not take."""
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(change(value.detach()), value.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = change(buffer)
    return model


def rank_on_a_gpu(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str, images: int = 5000) -> TrainingSetup:
    """The only one, with its network and images."""
    config = read_config(composed("data=synthetic", "devices=gpu", *overrides))
    parts = build(config)
    split = Split(torch.zeros(images, 3, 32, 32, dtype=torch.uint8), torch.zeros(images, dtype=torch.int64)).to(GPU)
    data = DatasetFiles(folder, tuple("0123456789"), images, images, (32, 32), MEAN, STD, "")
    plan = make_plan(config, 1, images, parts.schedule)
    job = new_job(config, "", parts, DeviceSet("gpu", 1, 1, 1, False), plan, data, folder, 0.0)
    control = RankControl(folder, folder, 0, 1, None)
    rank = build_training_setup(job, World(0, 1, GPU), control, lambda *_: None, split, split)

    def backward(_loss: Tensor) -> None:
        for parameter in rank.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    monkeypatch.setattr(Tensor, "backward", backward)
    return rank


RECIPES = ("experiment=reference", "optimizer=adamw", "experiment=speedrun", "experiment=speedrun94")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_captured_step_is_the_whole_step(
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
def test_an_optimizer_may_be_captured_unless_somebody_says_otherwise(
    overrides: list[str], settings: tuple[bool | None, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = rank_on_a_gpu(monkeypatch, tmp_path, "optimizer=adamw", *overrides)
    (group,) = rank.trainer.train_step.optimizer.param_groups
    assert (group["fused"], group["capturable"]) == settings


@pytest.mark.parametrize("what", [lambda: torch.ones(3).to(GPU), lambda: torch.ones(3, device=GPU).cpu()])
@pytest.mark.usefixtures("gpu")
def test_copies_would_be_noticed(what: Callable[[], Tensor]) -> None:
    with Crossings(allowed=True) as seen:
        what()
    assert seen.crossings == 1
    with Crossings(allowed=False), pytest.raises(AssertionError, match="between devices"):
        what()


@pytest.mark.parametrize("what", [lambda values: values.sum().item(), lambda values: values.nonzero()])
@pytest.mark.usefixtures("gpu")
def test_numbers_that_the_host_reads_would_be_noticed(what: Callable[[Tensor], object]) -> None:
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        what(torch.ones(3, device=GPU))
