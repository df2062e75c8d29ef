"""Winograd convolutions: exact for numbers with few digits, else as accurate as bfloat16 allows."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cifar_exp.cpu_kernels import llvm_vectors, winograd
from cifar_exp.cpu_kernels.fuse import fuse
from cifar_exp.cpu_kernels.layers import WinogradConvolution
from cifar_exp.cpu_kernels.replace import fuse_layers
from cifar_exp.models.build import seeded
from cifar_exp.models.networks import convnet
from tests.conftest import environment
from tests.helpers.defaults import with_defaults

Test = TypeVar("Test", bound=Callable[..., None])
pytestmark = pytest.mark.usefixtures("two_threads")


def has_instructions(test: Test) -> Test:
    """The test runs wherever the instructions exist, on processors with AMX, too, where the method does not pay."""
    skipped = pytest.mark.skipif(not winograd.runs(), reason="the processor multiplies no bfloat16 in AVX512")
    return skipped(pytest.mark.usefixtures("use_winograd_always")(test))


SHAPES = [  # images, channels of inputs and outputs, height, width
    (8, 32, 32, 16, 16),
    (3, 64, 96, 7, 9),
    (2, 24, 40, 5, 6),
    (5, 7, 3, 4, 4),
    (1, 32, 32, 1, 1),
    (1, 33, 65, 2, 31),
    (15, 40, 33, 5, 5),
]


@pytest.fixture
def use_winograd_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "pays", winograd.runs)


def integers(*shape: int, limit: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, shape, generator=generator).float()


def last(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def amid_nan(values: Tensor) -> Tensor:
    """The same where what lies before and behind in memory is no number, and lines of the cache begin elsewhere."""
    room = torch.full((values.numel() + 64,), torch.nan, dtype=values.dtype)
    made = room[1 : 1 + values.numel()].as_strided(values.shape, values.stride())
    return made.copy_(values)


@pytest.fixture
def no_memory_is_zero() -> Iterator[None]:
    """Fill new allocations with NaN, so that reads before the first write are noticed."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def exact(inputs: Tensor, weight: Tensor, bias: Tensor | None, gradient: Tensor) -> list[Tensor]:
    """Outputs and gradients of inputs, weight and bias in float64."""
    values = [value.double().requires_grad_() for value in (inputs, weight, torch.zeros(len(weight)))]
    outputs = F.conv2d(values[0], values[1], values[2] if bias is None else values[2] + bias.double(), padding=1)
    return [outputs.detach(), *torch.autograd.grad(outputs, values, gradient.double())]


@has_instructions
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.usefixtures("no_memory_is_zero")
def test_results_on_small_integers_equal_a_direct_convolution(shape: tuple[int, ...], threads: int) -> None:
    """bfloat16 represents these integers exactly, also when transformed, so any misplaced value shows."""
    torch.set_num_threads(threads)
    images, channels, outputs, height, width = shape
    assert torch.empty(2).isnan().all()
    inputs = amid_nan(last(integers(images, channels, height, width, limit=3, seed=0), torch.bfloat16))
    weight = last(4 * integers(outputs, channels, 3, 3, limit=2, seed=1))
    bias = integers(outputs, limit=9, seed=2)
    gradient = amid_nan(last(integers(images, outputs, height, width, limit=3, seed=3), torch.bfloat16))
    expected = exact(inputs, weight, bias, gradient)
    results = [
        winograd.convolve(inputs, weight, bias),
        winograd.convolve(gradient, weight, None, backward=True),
        *winograd.gradients(inputs, gradient, weight),
    ]
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value.to(result.dtype))
    assert all(result.is_contiguous(memory_format=torch.channels_last) for result in results[:3])
    without = winograd.convolve(inputs, weight, None)
    assert torch.equal(without, exact(inputs, weight, None, gradient)[0].to(torch.bfloat16))


@has_instructions
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_rounding_errors_are_close_to_those_of_a_direct_convolution(shape: tuple[int, ...]) -> None:
    images, channels, outputs, height, width = shape
    generator = torch.Generator().manual_seed(0)
    inputs, gradient, weight = (
        last(torch.randn(size, generator=generator), dtype)
        for size, dtype in (
            ((images, channels, height, width), torch.bfloat16),
            ((images, outputs, height, width), torch.bfloat16),
            ((outputs, channels, 3, 3), torch.float32),
        )
    )
    expected = exact(inputs, weight, None, gradient)
    layer = [weight.bfloat16(), [0], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]]
    direct = torch.ops.aten.convolution_backward(gradient, inputs, *layer)
    pairs = (
        (winograd.convolve(inputs, weight, None), F.conv2d(inputs, weight.bfloat16(), padding=1)),
        (winograd.convolve(gradient, weight, None, backward=True), direct[0]),
        (winograd.gradients(inputs, gradient, weight)[0], direct[1]),
    )
    for (result, reference), value in zip(pairs, expected, strict=False):
        error, others = ((some.double() - value).norm() / value.norm() for some in (result, reference))
        assert error < 3 * others
        assert error < 2**-7


@has_instructions
def test_channels_do_not_affect_each_other() -> None:
    """A NaN stays in its channel and image, but spreads to the neighbouring pixels in its tile."""
    inputs = last(torch.ones(16, 32, 16, 16), torch.bfloat16)
    inputs[3, 5, 8, 8] = torch.nan
    outputs = winograd.convolve(inputs, last(torch.ones(32, 32, 3, 3)), None)
    assert outputs[3, :, 7:10, 7:10].isnan().all()
    assert not outputs[[n for n in range(16) if n != 3]].isnan().any()
    gradient, weight = last(torch.ones(16, 8, 16, 16), torch.bfloat16), last(torch.ones(8, 32, 3, 3))
    of_weight, of_bias = winograd.gradients(inputs, gradient, weight)
    assert of_bias.eq(16**3).all()
    assert of_weight[:, 5].isnan().all()
    assert not of_weight[:, [c for c in range(32) if c != 5]].isnan().any()


def brain_bias() -> nn.Parameter:
    return nn.Parameter(torch.ones(64, dtype=torch.bfloat16))


def layers(**changes: object) -> nn.Sequential:
    settings: dict[str, object] = {"kernel_size": 3, "padding": 1, **changes}
    return nn.Sequential(nn.Conv2d(32, 64, **settings)).to(memory_format=torch.channels_last)  # type: ignore[arg-type]


def gradients(model: nn.Module, inputs: Tensor, weights: Tensor | None = None) -> list[Tensor]:
    """The outputs, and gradients of all that has some, of their sum or with ``weights``."""
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(inputs)
    wanted = [value for value in (inputs, *model.parameters()) if value.requires_grad]
    weights = torch.ones_like(outputs[:1, :1, :1, :1]).expand_as(outputs) if weights is None else weights
    return [outputs.detach(), *torch.autograd.grad(outputs, wanted, weights)]


@has_instructions
@pytest.mark.parametrize("change", [{}, {"padding": "same"}, {"bias": False}])
@pytest.mark.parametrize("frozen", [(), ("inputs",), ("weight",), ("bias",), ("weight", "bias"), ("inputs", "bias")])
@pytest.mark.parametrize("weights", ["all the same", "by planes", "channels-last"])
def test_layer_trains_like_pytorchs(change: dict[str, object], frozen: tuple[str, ...], weights: str) -> None:
    plain = layers(**change)
    for name, parameter in plain[0].named_parameters():
        parameter.requires_grad_(name not in frozen)
    state = torch.random.get_rng_state()
    model = fuse_layers(copy.deepcopy(plain), torch.bfloat16)
    assert torch.equal(state, torch.random.get_rng_state())
    assert type(model[0]) is WinogradConvolution
    inputs = last(integers(32, 32, 8, 8, limit=3, seed=0), torch.bfloat16).requires_grad_("inputs" not in frozen)
    planes = integers(32, 64, 8, 8, limit=3, seed=4).bfloat16()
    factors = {"all the same": None, "by planes": planes, "channels-last": last(planes, torch.bfloat16)}[weights]
    results, expected = gradients(model, inputs, factors), gradients(plain, inputs, factors)
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == value.dtype
        assert (result.float() - value.float()).norm() < 2**-7 * value.float().norm()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.eval()(inputs), results[0])


@pytest.mark.parametrize(
    "change",
    [
        {"stride": 2},
        {"dilation": 2, "padding": 2},
        {"groups": 2},
        {"padding": 0},
        {"padding": "valid"},
        {"padding_mode": "circular"},
        {"kernel_size": 1, "padding": "same"},
        {"kernel_size": (1, 3), "padding": "same"},
    ],
)
def test_other_convolutions_are_not_replaced(change: dict[str, object]) -> None:
    assert type(fuse_layers(layers(**change), torch.bfloat16)[0]) is nn.Conv2d


def test_other_dtypes_and_processors_keep_pytorch_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(fuse_layers(layers(), torch.float32)[0]) is nn.Conv2d
    for features in ({"avx512bf16", "avx512bw", "amx-bf16"}, {"avx512bw"}):
        monkeypatch.setattr(
            "cifar_exp.cpu_kernels.winograd.target", lambda features=features: ("", "", frozenset(features))
        )
        assert type(fuse_layers(layers(), torch.bfloat16)[0]) is nn.Conv2d


def test_instructions_disabled_for_numba_are_not_used() -> None:
    """LLVM would abort the process."""
    show = "print(here.fuse_layers(here.layers(), torch.bfloat16)[0])"
    code = f"import torch, tests.cpu_kernels.test_winograd as here; {show}"
    for setting in ({"NUMBA_ENABLE_AVX": "0"}, {"NUMBA_CPU_NAME": "generic"}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment() | setting,
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Conv2d(")


@pytest.mark.parametrize(
    ("features", "runs", "pays"),
    [(llvm_vectors.NEEDED, True, True), ({*llvm_vectors.NEEDED, "amx-bf16"}, True, False), ({"avx2"}, False, False)],
)
def test_winograd_is_used_with_avx512_bf16_and_without_amx(
    monkeypatch: pytest.MonkeyPatch, features: set[str], runs: bool, pays: bool
) -> None:
    monkeypatch.setattr(winograd, "target", lambda: ("", "", frozenset(features)))
    assert (winograd.runs(), winograd.pays()) == (runs, pays)


def test_network_works_if_the_winograd_kernel_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("cifar_exp.cpu_kernels.winograd.pays", lambda: True)
    monkeypatch.setattr("cifar_exp.cpu_kernels.numba_runtime.compiled", refuse)
    model = layers()
    assert fuse(model, torch.bfloat16) == "RuntimeError: no such instruction"
    assert type(model[0]) is nn.Conv2d


@has_instructions
@pytest.mark.parametrize(
    ("inputs", "change"),
    [
        (last(torch.ones(2, 32, 8, 8), torch.bfloat16), lambda _: None),
        (last(torch.ones(40, 32, 8, 8), torch.bfloat16), lambda layers: setattr(layers[0], "bias", brain_bias())),
        (last(torch.ones(600, 32, 1, 1), torch.bfloat16), lambda _: None),
        (torch.arange(32.0 * 2048).view(32, 32, 8, 8).bfloat16(), lambda _: None),
        (last(torch.ones(32, 32, 8, 8)), lambda _: None),
        (last(torch.ones(32, 32, 8, 8), torch.bfloat16), lambda layer: layer.bfloat16()),
        (last(torch.ones(32, 32, 8, 8), torch.bfloat16), lambda layer: layer.to(memory_format=torch.contiguous_format)),
    ],
    ids=[
        "few tiles",
        "bfloat16 bias",
        "tiles almost empty",
        "not channels-last",
        "float32",
        "bfloat16 weight",
        "weight not last",
    ],
)
def test_pytorch_computes_convolutions_that_do_not_fit_or_are_slower(
    inputs: Tensor, change: Callable[[nn.Module], None]
) -> None:
    plain = layers()
    model = fuse_layers(copy.deepcopy(plain), torch.bfloat16)
    for some in (plain, model):
        change(some)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(inputs), plain(inputs))


@has_instructions
def test_inputs_that_pytorch_refuses_are_refused() -> None:
    model, inputs = fuse_layers(layers(), torch.bfloat16), last(torch.ones(32, 64, 8, 8), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="channels"):
        model(inputs)


@has_instructions
def test_a_network_learns_as_with_pytorchs_layers() -> None:
    """Its first losses, which have few digits in bfloat16 either way."""
    losses = []
    for change in (lambda model: model, lambda model: fuse_layers(model, torch.bfloat16)):
        model = change(seeded(with_defaults(convnet), 10, 0).to(memory_format=torch.channels_last))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, 10, (64,), generator=generator)
        images = last(torch.randn(64, 3, 32, 32, generator=generator) + labels.view(-1, 1, 1, 1) / 4)
        losses.append([])
        for _ in range(8):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 0.2
    assert torch.allclose(*map(torch.tensor, losses), rtol=0.05)
