"""The networks are the published ones: parameter counts, shapes and initial values."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from cifar_exp.models.build import parameter_count, seeded
from cifar_exp.models.networks import convnet, resnet
from tests.helpers.defaults import with_defaults


def convnet_count(width: int, depth: int, num_classes: int) -> int:
    """In closed form: 3 -> w, w -> 2w, 2w -> 4w once each, all other convolutions from a width to itself."""
    kernels = 9 * (3 * width + (2 + 8) * width**2 + (depth - 1) * (1 + 4 + 16) * width**2)
    biases_and_norms = 3 * depth * (width + 2 * width + 4 * width)
    return kernels + biases_and_norms + 4 * width * num_classes + num_classes


def resnet_count(width: int, depth: int, num_classes: int) -> int:
    """In closed form, without biases of convolutions, with a 1x1 projection and its norm where the width doubles."""
    stem = 27 * width + 2 * width
    blocks = depth * 2 * sum(9 * wide**2 + 2 * wide for wide in (width, 2 * width, 4 * width))
    halved_inputs = 9 * (2 + 8) * width**2 - 9 * (4 + 16) * width**2
    projections = (2 * width**2 + 4 * width) + (8 * width**2 + 8 * width)
    return stem + blocks + halved_inputs + projections + 4 * width * num_classes + num_classes


def outputs_of(network: nn.Module, kind: type[nn.Module], images: Tensor) -> list[tuple[int, ...]]:
    """Shapes that the layers of a kind return, in order."""
    shapes: list[tuple[int, ...]] = []
    hooks = [
        layer.register_forward_hook(lambda _layer, _inputs, output: shapes.append(tuple(output.shape)))
        for layer in network.modules()
        if isinstance(layer, kind)
    ]
    network(images)
    for hook in hooks:
        hook.remove()
    return shapes


def test_the_reference_network_has_677610_parameters() -> None:
    assert parameter_count(with_defaults(convnet)(num_classes=10)) == 677_610
    assert convnet_count(32, 4, 10) == 677_610


@pytest.mark.parametrize(
    ("width", "depth", "num_classes"), [(4, 1, 10), (16, 2, 10), (32, 4, 10), (8, 7, 100), (1, 1, 2)]
)
def test_convnet_has_the_parameters_of_its_width_and_depth(width: int, depth: int, num_classes: int) -> None:
    network = convnet(num_classes=num_classes, width=width, depth=depth)
    assert parameter_count(network) == convnet_count(width, depth, num_classes)


def test_parameters_that_are_not_trained_are_not_counted() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))
    network[0].requires_grad_(requires_grad=False)
    assert parameter_count(network) == 2 * 5 + 5


@pytest.mark.parametrize("depth", [1, 3])
def test_max_pooling_follows_the_first_two_blocks_and_8x8_is_left_for_the_average(depth: int) -> None:
    images = torch.zeros(2, 3, 32, 32)
    network = convnet(num_classes=10, width=4, depth=depth)
    blocks = [(2, 4, 32, 32)] * depth + [(2, 8, 16, 16)] * depth + [(2, 16, 8, 8)] * depth
    assert outputs_of(network, nn.Conv2d, images) == blocks
    assert outputs_of(network, nn.MaxPool2d, images) == [(2, 4, 16, 16), (2, 8, 8, 8)]
    assert outputs_of(network, nn.AdaptiveAvgPool2d, images) == [(2, 16, 1, 1)]
    assert network(images).shape == (2, 10)
    kinds = [type(layer).__name__ for layer in network]
    block = ["Conv2d", "BatchNorm2d", "ReLU"] * depth
    head = ["AdaptiveAvgPool2d", "Flatten", "Linear"]
    assert kinds == [*block, "MaxPool2d", *block, "MaxPool2d", *block, *head]


def test_network_returns_logits_without_softmax() -> None:
    """The loss takes logits, not probabilities."""
    torch.manual_seed(0)
    logits = seeded(partial(convnet, width=4, depth=1), 5, seed=0)(torch.randn(64, 3, 32, 32))
    assert not torch.allclose(logits.sum(1), torch.ones(64))
    assert logits.min() < 0


def test_convnet_has_matlabs_initial_weights() -> None:
    """Glorot uniform: within sqrt(6 / (fan in + fan out)), evenly, and zero biases."""
    network = seeded(partial(convnet, width=16, depth=2), 10, seed=3)
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == 7
    for layer in layers:
        area = 9 if isinstance(layer, nn.Conv2d) else 1
        bound = math.sqrt(6 / (area * (layer.weight.shape[0] + layer.weight.shape[1])))
        assert layer.weight.abs().max() <= bound
        assert layer.weight.max() > 0.95 * bound
        assert layer.weight.min() < -0.95 * bound
        assert float(layer.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.06)
        assert layer.bias is not None
        assert not layer.bias.any()


@pytest.mark.parametrize(("factory", "count"), [(convnet, 12), (resnet, 21)])
def test_batch_norm_has_the_references_constants(factory: Callable[..., nn.Module], count: int) -> None:
    norms = [
        layer
        for layer in with_defaults(factory)(num_classes=10, width=4).modules()
        if isinstance(layer, nn.BatchNorm2d)
    ]
    assert len(norms) == count
    for norm in norms:
        assert (norm.eps, norm.momentum, norm.affine, norm.track_running_stats) == (1e-5, 0.1, True, True)


def test_resnet_20_has_the_published_parameters() -> None:
    """0.27 M in He et al. 2016, table 6: 269,722 with padded shortcuts, and the two projections of option B."""
    assert (
        parameter_count(with_defaults(resnet)(num_classes=10))
        == 269_722 + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
        == 272_474
    )


@pytest.mark.parametrize(("width", "depth", "num_classes"), [(16, 3, 10), (16, 9, 10), (4, 1, 3)])
def test_resnet_has_the_parameters_of_its_width_and_depth(width: int, depth: int, num_classes: int) -> None:
    network = resnet(num_classes=num_classes, width=width, depth=depth)
    assert parameter_count(network) == resnet_count(width, depth, num_classes)
    # n blocks of two convolutions in each of three stages, the stem and the classifier: 6 n + 2 layers.
    three = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)]
    assert len(three) + 1 == 6 * depth + 2


def test_resnet_halves_the_image_twice() -> None:
    network = resnet(num_classes=7, width=4, depth=2)
    images = torch.zeros(2, 3, 32, 32)
    shapes = []
    for name, part in network.named_children():
        images = part(images)
        shapes.append((name, tuple(images.shape)))
    assert shapes == [
        ("stem", (2, 4, 32, 32)),
        ("stage1", (2, 4, 32, 32)),
        ("stage2", (2, 8, 16, 16)),
        ("stage3", (2, 16, 8, 8)),
        ("head", (2, 7)),
    ]


def test_a_residual_block_adds_its_input() -> None:
    """With its convolutions at zero, a block is the ReLU of its input."""
    block = resnet(num_classes=2, width=4, depth=2).get_submodule("stage1.1").eval()
    for parameter in (block.get_parameter("conv1.weight"), block.get_parameter("conv2.weight")):
        nn.init.zeros_(parameter)
    inputs = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(inputs), inputs.clamp(min=0))


def test_initial_values_depend_on_the_seed_alone() -> None:
    factory = partial(convnet, width=4, depth=1)

    def values(seed: int) -> Tensor:
        return nn.utils.parameters_to_vector(seeded(factory, 10, seed).parameters()).detach()

    torch.manual_seed(1)
    first = values(7)
    torch.manual_seed(2)
    torch.rand(100)
    assert torch.equal(values(7), first)
    assert not torch.equal(values(8), first)


def test_seeding_a_model_does_not_change_the_global_rng() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    seeded(partial(convnet, width=4, depth=1), 10, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
