"""A rank on fake tensors, which have a shape, a dtype and a device but no values, so no GPU is needed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import swa_utils

from cifar_exp.config.reading import read_config
from cifar_exp.data.batches import constant_images
from cifar_exp.data.dataset_files import DatasetFiles, Split
from cifar_exp.distributed.process_group import World
from cifar_exp.distributed.rank_control import RankControl
from cifar_exp.launch.devices import DeviceSet
from cifar_exp.runs.components import build
from cifar_exp.runs.plan_job import new_job
from cifar_exp.training.plan import make_plan
from cifar_exp.worker.training_setup import TrainingSetup, build_training_setup
from tests.helpers.configs import composed

GPU = torch.device("cuda", 0)
MEAN, STD = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)


@contextmanager
def fake_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake tensors on a GPU with native bfloat16."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(nn.Module, "_apply", _moved)
    constant_images.cache_clear()
    with FakeTensorMode() as mode:
        monkeypatch.setattr(swa_utils, "deepcopy", lambda model: deepcopy(model, {id(mode): mode}))
        yield
    constant_images.cache_clear()


def _moved(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Torch would copy the new values into the old tensors, which is impossible for fake tensors."""
    for module in model.modules():
        for name, value in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(change(value.detach()), value.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = change(buffer)
    return model


def fake_rank(
    monkeypatch: pytest.MonkeyPatch, folder: Path, accelerator: str, *overrides: str, images: int
) -> TrainingSetup:
    """The only rank, with its network and images, in :func:`fake_tensors`. Gradients are zeros."""
    config = read_config(composed("data=synthetic", f"devices={accelerator}", *overrides))
    parts = build(config)
    split = Split(torch.zeros(images, 3, 32, 32, dtype=torch.uint8), torch.zeros(images, dtype=torch.int64)).to(GPU)
    data = DatasetFiles(folder, tuple("0123456789"), images, images, (32, 32), MEAN, STD, "")
    plan = make_plan(config, 1, images, parts.schedule)
    job = new_job(config, "", parts, DeviceSet(accelerator, 1, 1, 1, False), plan, data, folder, 0.0)
    control = RankControl(folder, folder, 0, 1, None)
    rank = build_training_setup(job, World(0, 1, GPU), control, lambda *_: None, split, split)

    def backward(_loss: Tensor) -> None:
        for parameter in rank.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    monkeypatch.setattr(Tensor, "backward", backward)
    return rank
