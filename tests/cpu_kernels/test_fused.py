"""Fused layers compute the same as PyTorch's, on any number of threads, and a run works without them if it must."""

import copy
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cifar_exp.cpu_kernels.fuse import fuse
from cifar_exp.cpu_kernels.layers import FusedBatchNorm, HalvingMaxPool
from cifar_exp.cpu_kernels.replace import fuse_layers
from cifar_exp.errors import ConfigError
from cifar_exp.models.build import seeded
from cifar_exp.models.networks import convnet, resnet
from cifar_exp.models.speednet import speednet
from tests.conftest import TINY, environment
from tests.helpers.defaults import with_defaults

Results = dict[str, Tensor]
pytestmark = pytest.mark.usefixtures("two_threads")

ROUNDING = {torch.float32: 2.0**-17, torch.bfloat16: 2.0**-8}


def channels_last(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) * 2 + 1
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def with_any_values(layers: nn.Sequential) -> nn.Sequential:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layers


def step(layers: nn.Module, inputs: Tensor) -> Results:
    """Outputs, gradients and statistics of a training step. The loss is a sum with weights of few digits."""
    inputs = inputs.clone(memory_format=torch.preserve_format).requires_grad_()
    outputs = layers(inputs)
    weights = channels_last(*outputs.shape, seed=2, dtype=torch.bfloat16).to(outputs.dtype)
    parameters = dict(layers.named_parameters())
    gradients = torch.autograd.grad(outputs, [inputs, *parameters.values()], weights)
    return {
        "outputs": outputs.detach(),
        **dict(zip(["inputs", *parameters], gradients, strict=True)),
        **{name: value.clone() for name, value in layers.named_buffers()},
    }


def assert_close(results: Results, exact: Results, dtype: torch.dtype) -> None:
    """Equal up to the rounding error of ``dtype`` for numbers of this size."""
    assert results.keys() == exact.keys()
    for name, value in exact.items():
        scale = value.abs().max().clamp_min(1)
        error = (results[name].double() - value.double()).abs().max() / scale
        assert error <= ROUNDING[dtype], f"{name}: {float(error)}"


LAYERS: dict[str, Callable[[int], list[nn.Module]]] = {
    "alone": lambda channels: [nn.BatchNorm2d(channels)],
    "ReLU": lambda channels: [nn.BatchNorm2d(channels, momentum=0.4, eps=1e-3), nn.ReLU()],
    "GELU": lambda channels: [nn.BatchNorm2d(channels), nn.GELU()],
    "cumulative": lambda channels: [nn.BatchNorm2d(channels, momentum=None), nn.ReLU()],
    "not affine": lambda channels: [nn.BatchNorm2d(channels, affine=False), nn.ReLU()],
    "not tracking": lambda channels: [nn.BatchNorm2d(channels, track_running_stats=False), nn.ReLU()],
    "pooling": lambda channels: [nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)],
    "pooling first": lambda channels: [nn.MaxPool2d((2, 2)), nn.BatchNorm2d(channels), nn.GELU()],
}


@pytest.mark.parametrize("shape", [(16, 32, 8, 8), (5, 3, 7, 9), (3, 17, 4, 5), (3, 48, 31, 30)])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_training_step_matches_pytorch_layers(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Compared with float64. In bfloat16 values of a window are often equal: only pooling's outputs are compared."""
    inputs = channels_last(*shape, dtype=dtype)
    own = with_any_values(nn.Sequential(*LAYERS[name](shape[1])))
    exact, layers = copy.deepcopy(own).double(), fuse_layers(own, dtype)
    assert any(isinstance(layer, FusedBatchNorm) for layer in layers)
    for _ in range(2):  # statistics go on
        expected, results = step(exact, inputs.double()), step(layers, inputs)
    if name == "pooling" and dtype == torch.bfloat16:
        expected, results = {"outputs": expected["outputs"]}, {"outputs": results["outputs"]}
    assert_close(results, expected, dtype)
    assert results["outputs"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_evaluation_matches_pytorch_layers(name: str, dtype: torch.dtype) -> None:
    inputs = channels_last(6, 24, 9, 8, dtype=dtype)
    own = with_any_values(nn.Sequential(*LAYERS[name](24)))
    own(channels_last(8, 24, 9, 8, seed=3))
    exact, layers = copy.deepcopy(own).double().eval(), fuse_layers(own, dtype).eval()
    before = copy.deepcopy(layers.state_dict())
    with torch.no_grad():
        assert_close({"outputs": layers(inputs)}, {"outputs": exact(inputs.double())}, dtype)
    assert all(torch.equal(value, before[key]) for key, value in layers.state_dict().items())
    derived = step(layers, inputs.float())  # by PyTorch's own
    assert_close(derived, step(copy.deepcopy(exact), inputs.double()), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_pooling_equals_pytorch_bit_for_bit(dtype: torch.dtype) -> None:
    """Also for equal values in a window and for odd sides."""
    for shape in ((4, 16, 8, 8), (3, 5, 7, 9), (2, 8, 2, 3)):
        inputs = channels_last(*shape, dtype=dtype).round()
        layers = fuse_layers(nn.Sequential(nn.MaxPool2d(2)), dtype)
        assert isinstance(layers[0], HalvingMaxPool)
        results, expected = step(layers, inputs), step(nn.MaxPool2d(2), inputs)
        assert all(torch.equal(results[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", LAYERS)
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    inputs = channels_last(7, 12, 11, 10, dtype=torch.bfloat16)
    layers = fuse_layers(with_any_values(nn.Sequential(*LAYERS[name](12))), torch.bfloat16)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(step(copy.deepcopy(layers), inputs))
    for other in results[1:]:
        assert all(torch.equal(value, other[key]) for key, value in results[0].items())


def test_variance_of_large_close_numbers_is_accurate() -> None:
    inputs = channels_last(32, 4, 8, 8) / 100 + 1000
    layer = fuse_layers(nn.Sequential(nn.BatchNorm2d(4, eps=0, momentum=1.0)), torch.float32)
    outputs = layer(inputs)
    variance = inputs.double().var((0, 2, 3))
    assert torch.allclose(layer[0].running_var.double(), variance, rtol=1e-3)
    assert torch.allclose(outputs.var((0, 2, 3)), torch.ones(4), atol=2e-3)


def test_nan_is_propagated() -> None:
    inputs = channels_last(4, 16, 8, 8, dtype=torch.bfloat16)
    inputs[1, 3, 2, 2] = torch.nan
    layers = fuse_layers(nn.Sequential(nn.BatchNorm2d(16), nn.ReLU()), torch.bfloat16)
    outputs = layers(inputs)
    assert outputs[:, 3].isnan().all()
    assert not outputs[:, :3].isnan().any()
    assert layers[0].running_mean[3].isnan()
    pooled = fuse_layers(nn.Sequential(nn.MaxPool2d(2)), torch.bfloat16)(inputs)
    assert pooled.isnan().sum() == 1
    assert pooled[1, 3, 1, 1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("factory", map(with_defaults, (convnet, resnet, speednet)))
def test_parameters_buffers_and_names_of_the_network_are_unchanged(
    factory: Callable[..., nn.Module], dtype: torch.dtype
) -> None:
    """Same names, same memory: optimizer, checkpoints and prediction do not depend on fused layers."""
    model = seeded(factory, 10, 0).to(memory_format=torch.channels_last)
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    plain = copy.deepcopy(model)
    fuse_layers(model, dtype)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert not [layer for layer in model.modules() if type(layer) is nn.BatchNorm2d]
    images = channels_last(8, 3, 32, 32)
    assert torch.allclose(model(images), plain(images), atol=1e-4)  # in float32, whatever it was made for


def test_only_an_activation_in_the_next_layer_is_fused() -> None:
    relu, dropout = nn.ReLU(), nn.Dropout()
    layers = fuse_layers(nn.Sequential(dropout, nn.BatchNorm2d(4), dropout, relu), torch.float32)
    assert layers[3] is relu
    outer = nn.Sequential(nn.Sequential(nn.BatchNorm2d(4)), relu)
    assert fuse_layers(outer, torch.float32)[1] is relu
    named = OrderedDict(norm=nn.BatchNorm2d(4), activation=nn.GELU(approximate="tanh"))
    assert type(fuse_layers(nn.Sequential(named), torch.float32).activation) is nn.GELU
    ceiling = nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(3, 2), nn.MaxPool2d(2, 2, 1))
    assert {type(layer) for layer in fuse_layers(ceiling, torch.float32)} == {nn.MaxPool2d}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_layers_of_other_dtypes_are_not_replaced(dtype: torch.dtype) -> None:
    assert type(fuse_layers(nn.Sequential(nn.BatchNorm2d(4)), dtype)[0]) is nn.BatchNorm2d


def test_pytorch_computes_what_has_no_kernel() -> None:
    layers = fuse_layers(nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.ReLU()), torch.float32)
    plain = nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.ReLU())
    for inputs in (channels_last(3, 4, 6, 6).contiguous(), channels_last(3, 4, 6, 6).double()):
        expected = plain.to(inputs.dtype)(inputs)
        assert torch.equal(layers.to(inputs.dtype)(inputs), expected)
    halved = fuse_layers(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), torch.bfloat16).bfloat16()
    inputs = channels_last(3, 4, 6, 6, dtype=torch.bfloat16)
    assert torch.equal(halved(inputs), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).bfloat16()(inputs))
    with pytest.raises(ValueError, match="more than 1 value"):
        layers.float()(channels_last(1, 4, 2, 2))


def changed(layer: nn.BatchNorm2d, change: Callable[[nn.BatchNorm2d], Any]) -> nn.BatchNorm2d:
    change(layer)
    return layer


def strided(values: Tensor) -> nn.Parameter:
    """The same numbers in a non-contiguous tensor."""
    return nn.Parameter(torch.stack([values, torch.full_like(values, 7)], 1)[:, 0])


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "weight", strided(torch.arange(4.0))),
        lambda layer: setattr(layer, "bias", strided(torch.arange(4.0))),
        lambda layer: setattr(layer, "running_var", strided(torch.ones(4)).detach()),
        lambda layer: setattr(layer, "track_running_stats", False),
        lambda layer: setattr(layer, "num_batches_tracked", None),
        lambda layer: layer.weight.requires_grad_(False),
    ],
    ids=["weight", "bias", "statistics", "not tracking any more", "not counting", "frozen"],
)
def test_layer_changed_after_fusion_is_computed_with_its_new_values(change: Callable[[nn.BatchNorm2d], Any]) -> None:
    inputs = channels_last(3, 4, 6, 6)
    for training in (True, False):
        plain, model = (changed(nn.BatchNorm2d(4), change).train(training) for _ in range(2))
        layers = fuse_layers(nn.Sequential(model, nn.ReLU()), torch.float32)
        assert torch.allclose(layers(inputs), plain(inputs).relu(), atol=1e-5)
        assert torch.allclose(layers[0].running_mean, plain.running_mean, atol=1e-6)
        assert torch.allclose(layers[0].running_var, plain.running_var, atol=1e-6)


def test_a_layer_in_evaluation_can_be_trained_further() -> None:
    """Its scale and shift, by images of which no gradient is wanted."""
    inputs = channels_last(3, 4, 6, 6)
    plain = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).eval()
    layers = fuse_layers(copy.deepcopy(plain), torch.float32).eval()
    for model in (plain, layers):
        model(inputs).square().sum().backward()
    assert torch.allclose(layers[0].weight.grad, plain[0].weight.grad)
    assert torch.allclose(layers[0].bias.grad, plain[0].bias.grad)


def test_default_dtype_does_not_change_results() -> None:
    layers = fuse_layers(nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.ReLU()), torch.float32)
    trained = fuse_layers(nn.Sequential(nn.BatchNorm2d(4)), torch.float32)
    inputs = channels_last(3, 4, 6, 6)
    before, gradients = layers(inputs), step(trained, inputs)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(layers(inputs), before)
        assert torch.equal(step(trained, inputs)["0.weight"], gradients["0.weight"])
    finally:
        torch.set_default_dtype(torch.float32)


def test_inputs_that_pytorch_refuses_are_refused() -> None:
    for channels in (4, 8):
        layers = fuse_layers(nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU()), torch.float32)
        with pytest.raises(RuntimeError, match=r"running_mean|weight"):
            layers(channels_last(2, 12 - channels, 4, 4))
    for sides in ((1, 1), (1, 4), (4, 1)):
        with pytest.raises(RuntimeError, match="too small"):
            fuse_layers(nn.Sequential(nn.MaxPool2d(2)), torch.float32)(channels_last(2, 4, *sides))


class Residual(nn.Sequential):
    def forward(self, inputs: Tensor) -> Tensor:
        normalized = self[0](inputs)
        return normalized + self[1](normalized)


def test_shared_and_hooked_layers_are_not_replaced() -> None:
    inputs = channels_last(3, 4, 6, 6)
    own = Residual(nn.BatchNorm2d(4), nn.ReLU())
    assert torch.allclose(fuse_layers(copy.deepcopy(own), torch.float32)(inputs), own(inputs), atol=1e-5)
    shared = nn.BatchNorm2d(4)
    twice = fuse_layers(nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared)), torch.float32)
    assert twice[0] is twice[2][0] is shared
    seen = []
    hooked = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    for layer in hooked:
        layer.register_forward_hook(lambda layer, _inputs, _outputs: seen.append(layer))
    fuse_layers(hooked, torch.float32)(inputs)
    assert seen == list(hooked)


def test_damaged_cached_machine_code_is_compiled_again(tmp_path: Path) -> None:
    """Each variant has its own cache index: two processes that write one index would corrupt it."""
    test = "here.test_pooling_equals_pytorch_bit_for_bit"
    code = f"import torch, tests.cpu_kernels.test_fused as here; {test}(torch.float32); {test}(torch.bfloat16)"
    settings = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], env=settings, check=True, timeout=120)
        kept = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len([path for path in kept if path.suffix == ".nbi"]) == 4, "two kernels, two types"
        for path in kept:
            path.write_bytes(b"")


def test_machine_code_is_compiled_again_if_the_cache_is_not_writable(tmp_path: Path) -> None:
    """As on a full disk."""
    (tmp_path / "file").write_text("")
    test = "test_pooling_equals_pytorch_bit_for_bit"
    code = f"import torch, tests.cpu_kernels.test_fused as here; here.{test}(torch.float32)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "file" / "below")},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_network_works_if_a_kernel_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("cifar_exp.cpu_kernels.numba_runtime.compiled", refuse)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(memory_format=torch.channels_last)
    assert fuse(model, torch.float32) == "RuntimeError: no such instruction"
    assert model(channels_last(2, 3, 8, 8)).shape == (2, 4, 6, 6)


@pytest.mark.parametrize("choice", ["auto", "never"])
def test_run_without_numba_warns_once_and_trains(workplace: Path, choice: str) -> None:
    (workplace / "hidden").mkdir()
    (workplace / "hidden" / "numba.py").write_text("raise ModuleNotFoundError(\"No module named 'numba'\")")
    options = [*TINY, "tracking=none", f"train.compile={choice}", "devices.count=2", "devices.oversubscribe=true"]
    done = subprocess.run(
        [sys.executable, "-m", "cifar_exp", *options],
        cwd=workplace,
        env={**environment(), "PYTHONPATH": str(workplace / "hidden")},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pip install 'cifar-exp[cpu]'") == (choice == "auto")


class Parts(nn.Module):
    """Calls its ``nn.Sequential`` in two parts, with something between them."""

    def __init__(self, cut: int, between: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.cut, self.between = cut, between

    def forward(self, images: Tensor) -> Tensor:
        values: Tensor = self.layers[: self.cut](images)
        if self.cut == 2 and self.between:
            values = values + self.between
        outputs: Tensor = self.layers[self.cut :](values) if self.cut != 2 or self.between else values
        return outputs


def trained_parts(model: nn.Module, steps: int = 4) -> Tensor:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images = images.to(memory_format=torch.channels_last)
    for _ in range(steps):
        outputs: Tensor = model(images)
        outputs.sum().backward()
    return outputs


@pytest.mark.parametrize("cut", [1, 3])
def test_parts_that_keep_batch_norm_and_activation_together_work(cut: int) -> None:
    torch.manual_seed(0)
    model = Parts(cut).to(memory_format=torch.channels_last)
    expected = trained_parts(copy.deepcopy(model))
    fused = copy.deepcopy(fuse_layers(model, torch.float32))
    torch.testing.assert_close(trained_parts(fused), expected)


@pytest.mark.parametrize("between", [0.0, 1.0])
def test_a_network_that_calls_them_apart_is_refused(between: float) -> None:
    model = fuse_layers(Parts(2, between).to(memory_format=torch.channels_last), torch.float32)
    with pytest.raises(ConfigError, match=r"Set train\.compile=never"):
        trained_parts(model)


def test_recomputed_activations_are_accepted() -> None:
    torch.manual_seed(0)
    layers = Parts(3).layers.to(memory_format=torch.channels_last)
    expected = trained_parts(copy.deepcopy(layers))
    fused = fuse_layers(layers, torch.float32)
    recomputed = Recomputed(fused)
    torch.testing.assert_close(trained_parts(recomputed), expected)


class Recomputed(nn.Module):
    """Keeps no activations for the backward pass, but computes them again."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = checkpoint(self.layers, images.requires_grad_(), use_reentrant=False)
        return outputs
