"""The network of an untrusted run: only a network is built, no download, memory limited by the checkpoint."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import WeightsEnum

from cifar_exp.config.targets import ALLOWED
from cifar_exp.data.batches import Normalization
from cifar_exp.data.image_reader import Preprocessing
from cifar_exp.errors import ConfigError, StorageError
from cifar_exp.models.networks import convnet
from cifar_exp.runs.classifier import Classifier
from cifar_exp.runs.components import model_factory
from cifar_exp.runs.foreign_network import network_of
from cifar_exp.system.memory_limit import memory_limited

CONVNET = {"_target_": "cifar_exp.models.networks.convnet", "width": 4, "depth": 1}
STATE = convnet(num_classes=3, width=4, depth=1).state_dict()

# Functions and classes that run code, start programs, read, write or send files, or do so with an argument.
HARMFUL = [
    "torch.utils.collect_env.run",
    "torch.hub.load",
    "torch.hub.download_url_to_file",
    "torch.hub.load_state_dict_from_url",
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "torch.ops.load_library",
    "torch.classes.load_library",
    "torch.utils.cpp_extension.load",
    "torch.utils.cpp_extension.load_inline",
    "torch.utils.cpp_extension.subprocess.run",
    "torch.utils.model_zoo.load_url",
    "torch.multiprocessing.spawn",
    "torch.package.PackageImporter",
    "torch.onnx.export",
    "torch.export.load",
    "torch.compile",
    "torch.fx.GraphModule",
    "torch.distributed.run.main",
    "torch.distributed.launcher.api.elastic_launch",
    "torch.utils.tensorboard.SummaryWriter",
    "torch.serialization.load",
    "torch.storage.TypedStorage",
    "torch.from_file",
    "torch.UntypedStorage.from_file",
    "torch.nn.Module.register_forward_hook",
    "torch.nn.modules.module.torch.load",
    "torch.nn.functional.torch.hub.load",
    "torch.nn.init.warnings.warn",
    "torch.nn.utils.clip_grad_norm_",
    "torch.nn.modules.module._addindent",
    "torch.nn.parallel.data_parallel",
    "torch.optim.SGD",
    "torchvision.io.write_file",
    "torchvision.io.read_file",
    "torchvision.datasets.utils.download_url",
    "torchvision.datasets.CIFAR10",
    "torchvision.datasets.ImageFolder",
    "torchvision.transforms.Lambda",
    "torchvision.models.get_weight",
    "torchvision.models.list_models",
    "torchvision.models._api.load_state_dict_from_url",
    "torchvision.models._utils.IntermediateLayerGetter.forward",
    "torchvision.models.resnet.partial",
    "cifar_exp.models.networks.partial",
    "cifar_exp.models..os.system",
    "cifar_exp.data.download.fetch",
    "cifar_exp.system.process.end_process",
    "cifar_exp.records.checkpoint.save",
    "hydra.utils.get_class",
    "hydra.utils.instantiate",
    "os.system",
    "posix.system",
    "builtins.exec",
    "builtins.eval",
    "builtins.__import__",
    "subprocess.run",
    "pathlib.Path.write_text",
    "",
    ".",
    "torch.nn.",
    "torch.nn",
    "torch.nn.*",
]


CLONES = {
    "_target_": "torch.nn.TransformerEncoder",
    "encoder_layer": {"_target_": "torch.nn.TransformerEncoderLayer", "d_model": 2, "nhead": 1, "dim_feedforward": 1},
    "num_layers": 10**9,
}


@pytest.mark.parametrize("target", HARMFUL)
def test_target_that_is_not_a_network_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="model"):
        model_factory({"_target_": target, "command": "touch executed"}, ())
    for place in ({"norm_layer": {"_target_": target}}, {"layers": [{"_target_": target, "_partial_": True}]}):
        with pytest.raises(ConfigError, match="model"):
            model_factory({"_target_": "torchvision.models.resnet18", **place}, ())


@pytest.mark.parametrize("section", ["augment", "schedule", "launcher", "tracking", "data", "optimizer"])
def test_allow_lists_differ_by_section(section: str) -> None:
    for pattern in ALLOWED[section]:
        with pytest.raises(ConfigError, match="model"):
            model_factory({"_target_": pattern.replace("*", "x")}, ())


@pytest.mark.parametrize("target", [None, 3, ["os.system"], {"_target_": "os.system"}])
def test_target_that_is_not_a_string_is_refused(target: object) -> None:
    with pytest.raises(ConfigError, match="model"):
        network_of({"_target_": target}, STATE, 3, ())


def test_valid_network_is_loaded_with_its_weights() -> None:
    model = network_of(CONVNET, STATE, 3, ())
    assert not model.training
    assert all(torch.equal(value, STATE[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "settings",
    [
        {"_target_": "torchvision.models.get_model", "name": "resnet18", "weights": "IMAGENET1K_V1"},
        {"_target_": "torchvision.models.segmentation.fcn_resnet50"},  # its backbone has weights by default
    ],
    ids=lambda settings: settings["_target_"],
)
def test_no_weights_are_downloaded(settings: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("a download"))
    fetch = WeightsEnum.get_state_dict
    count = 1000 if "segmentation" not in settings["_target_"] else 21
    with pytest.raises(ConfigError, match=r"it would download .* trust it, set 'trusted_modules="):
        network_of(settings, STATE, count, ())
    assert WeightsEnum.get_state_dict is fetch
    with pytest.raises(ConfigError, match=r"model\.weights=DEFAULT: ") as refusal:
        network_of({"_target_": "torchvision.models.resnet18", "weights": "DEFAULT"}, STATE, 1000, ())
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize(
    "settings",
    [
        CONVNET | {"width": 100_000},
        {"_target_": "torch.nn.Linear", "in_features": 10**6, "out_features": 10**6},
    ],
    ids=lambda settings: settings["_target_"],
)
def test_a_network_far_larger_than_its_checkpoint_is_refused(settings: Mapping[str, Any]) -> None:
    factory = dict(settings)
    if "Linear" in settings["_target_"]:
        factory = {"_target_": "torchvision.models.VGG", "features": settings}
    with pytest.raises(ConfigError, match="needs more memory than its checkpoint"):
        network_of(factory, STATE, 3, ())
    torch.zeros(3 * 2**28)  # 3 GiB: there is no limit afterwards


@pytest.mark.parametrize(
    "settings",
    [
        CONVNET | {"depth": 10**9},
        CONVNET | {"_target_": "cifar_exp.models.networks.resnet", "depth": 10**9},
        {"_target_": "torchvision.models.VGG", "features": CLONES},  # copied layers
    ],
    ids=lambda settings: settings["_target_"],
)
def test_a_network_of_far_more_layers_than_its_checkpoint_is_refused_at_once(settings: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"far more layers than its checkpoint, which has \d+ tensors"):
        network_of(settings, STATE, 3, ())
    assert len(nn.Sequential(*(nn.Linear(1, 1) for _ in range(4000)))) == 4000  # there is no limit afterwards


@pytest.mark.parametrize("settings", [CONVNET | {"width": 8}, CONVNET | {"depth": 2}], ids=str)
def test_checkpoint_of_another_network_is_reported(settings: Mapping[str, Any]) -> None:
    with pytest.raises(StorageError, match=r"does not fit the network that config\.yaml describes: .*Restore"):
        network_of(settings, STATE, 3, ())


def test_error_of_a_network_is_reported() -> None:
    with pytest.raises(ConfigError, match=r"model: torchvision\.models\.get_model cannot be built: .*nothing"):
        network_of({"_target_": "torchvision.models.get_model", "name": "nothing"}, STATE, 3, ())


def test_memory_is_limited_only_inside_the_context(tmp_path: Path) -> None:
    with memory_limited(0), pytest.raises((RuntimeError, MemoryError)):
        torch.empty(2**40)
    assert Classifier.batch.fget is not None
    assert nn.Linear(2, 2).weight.shape == (2, 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_that_returns_no_numbers_labels_nothing(value: float) -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    classifier = Classifier(model.eval(), "abc", Normalization(), Preprocessing((4, 4)), (4, 4))
    assert len(classifier.label([torch.zeros(3, 4, 4, dtype=torch.uint8)] * 2)) == 2
    nn.init.constant_(model[2].bias, value)
    with pytest.raises(ConfigError, match="its outputs for 2 of 2 images are no finite numbers"):
        classifier.label([torch.zeros(3, 4, 4, dtype=torch.uint8)] * 2)
