"""The whitening layer whitens its training images; the network has the documented shape."""

import pytest
import torch
from torch import Tensor, nn

from cifar_exp.models import speednet as networks
from cifar_exp.models.build import initialize_from_images, parameter_count, seeded
from cifar_exp.models.speednet import GlobalMaxPool, Whitening, patches_of
from tests.helpers.defaults import with_defaults

speednet = with_defaults(networks.speednet)


def correlated_images(count: int = 200) -> Tensor:
    """Neighbours and colours that go together, at unequal strength: (N, 3, 16, 16)."""
    noise = torch.randn(count, 3, 17, 17, generator=torch.Generator().manual_seed(0))
    smooth = noise[:, :, 1:, 1:] + 0.8 * noise[:, :, :-1, 1:] + 0.5 * noise[:, :, 1:, :-1]
    mix = torch.tensor([[1.0, 0.6, 0.3], [0.0, 0.8, 0.3], [0.0, 0.0, 0.5]])
    return torch.einsum("nchw,cd->ndhw", smooth, mix)


def second_moments(outputs: Tensor) -> Tensor:
    """(N, C, H, W) -> (C, C), not centred."""
    flat = outputs.transpose(0, 1).flatten(1).double()
    return flat @ flat.T / flat.shape[1]


@pytest.mark.parametrize("side", [2, 3])
def test_whitened_patches_are_uncorrelated_at_unit_variance_and_come_with_their_negatives(side: int) -> None:
    images, layer = correlated_images(), Whitening(side)
    assert (second_moments(layer(images))[: 3 * side**2] - torch.eye(3 * side**2, 6 * side**2)).abs().max() > 0.3
    layer.initialize_from(images)
    outputs = layer(images)
    components, negatives = outputs.chunk(2, 1)
    assert components.shape[1] == 3 * side**2
    moments = second_moments(components)
    torch.testing.assert_close(moments, torch.eye(3 * side**2, dtype=torch.float64), atol=0.03, rtol=0)
    assert (moments - moments.diag().diag()).abs().max() < 1e-5
    torch.testing.assert_close(negatives, -components)


def test_weak_components_are_amplified_less_than_to_unit_variance() -> None:
    """The added variance is a share of the mean one: for a component without any, the weights stay finite."""
    images, layer = correlated_images(), Whitening()
    images[:, 2] = images[:, 1]  # four components of no variance
    layer.initialize_from(images)
    variances = second_moments(layer(images)).diag()[:12]
    assert (variances < 1e-3).sum() == 4
    strongest = 1 / (5e-4 * patches_of(images, 2).square().mean()).sqrt()
    assert layer.weight.flatten(1).norm(dim=1).max() <= 1.01 * strongest


def test_whitening_does_not_depend_on_the_scale_of_the_pixels() -> None:
    """-1 to 1 or -128 to 127: the same outputs."""
    images, small, large = correlated_images(), Whitening(), Whitening()
    small.initialize_from(images)
    large.initialize_from(100 * images)
    torch.testing.assert_close(large.weight.abs() * 100, small.weight.abs(), atol=1e-3, rtol=1e-3)


def test_whitening_patches_match_the_convolutions_windows() -> None:
    images, layer = correlated_images(3), Whitening()
    products = patches_of(images, 2) @ layer.weight.flatten(1).T
    torch.testing.assert_close(products, layer(images).permute(0, 2, 3, 1).reshape(-1, 24), atol=1e-5, rtol=1e-5)


def test_whitening_layer_is_initialised_in_place_and_frozen() -> None:
    network = speednet(num_classes=10, widths=(8, 8, 8))
    initialize_from_images(network, correlated_images())
    before = network[0].weight.clone()
    moments = second_moments(network[0](correlated_images()))[:12, :12]
    torch.testing.assert_close(moments, torch.eye(12, dtype=torch.float64), atol=0.03, rtol=0)
    network(correlated_images(4)).sum().backward()
    torch.optim.SGD(network.parameters(), lr=1.0, weight_decay=0.1).step()
    assert torch.equal(network[0].weight, before)
    again = speednet(num_classes=10, widths=(8, 8, 8))
    again.load_state_dict(network.state_dict())  # as a run that is used later does, without any image
    assert torch.equal(again[0].weight, before)


def test_without_whitening_the_first_layer_is_trained_and_needs_no_images() -> None:
    network = speednet(num_classes=10, widths=(8, 8, 8), whitening=False)
    before = network[0].weight.clone()
    initialize_from_images(network, correlated_images())
    assert torch.equal(network[0].weight, before)
    assert network[0].weight.requires_grad
    trained = speednet(num_classes=10, widths=(8, 8, 8))
    assert parameter_count(network) == parameter_count(trained) + 24 * 12


@pytest.mark.parametrize(
    ("widths", "depth", "num_classes"), [((64, 128, 256), 2, 10), ((64, 256, 256), 2, 10), ((8, 16, 24), 3, 5)]
)
def test_speednet_has_the_parameters_of_its_widths(widths: tuple[int, int, int], depth: int, num_classes: int) -> None:
    """Kernels and batch norm's offsets: neither the whitening layer nor batch norm's scales are trained."""
    expected, channels = widths[2] * num_classes, 24
    for width in widths:
        expected += 9 * channels * width + (depth - 1) * 9 * width**2 + depth * width
        channels = width
    assert parameter_count(speednet(num_classes=num_classes, widths=widths, depth=depth)) == expected


@pytest.mark.parametrize(("size", "sides"), [(32, [15, 7, 3]), (24, [11, 5, 2]), (20, [9, 4, 2]), (16, [7, 3, 1])])
def test_each_block_halves_images_of_any_size(size: int, sides: list[int]) -> None:
    network = speednet(num_classes=10, widths=(4, 6, 8))
    shapes: list[tuple[int, ...]] = []
    for layer in network:
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda _layer, _inputs, output: shapes.append(tuple(output.shape[1:])))
    assert network(torch.randn(2, 3, size, size)).shape == (2, 10)
    assert shapes == [(width, side, side) for width, side in zip((4, 6, 8), sides, strict=True) for _ in range(2)]


def test_convolutions_start_as_the_identity_on_their_first_channels() -> None:
    network = seeded(speednet, 10, seed=0)
    first, second = (layer for layer in list(network.modules())[2:] if getattr(layer, "out_channels", 0) == 64)
    inputs = torch.randn(2, 24, 9, 9)
    torch.testing.assert_close(first(inputs)[:, :24], inputs)
    assert first.weight[24:].std() > 0.01
    inputs = torch.randn(2, 64, 9, 9)
    torch.testing.assert_close(second(inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_global_max_and_gradient_equal_adaptive_pooling(dtype: torch.dtype) -> None:
    """Also for several equal maxima: the first one gets the gradient."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-2, 3, (5, 7, 3, 2), generator=generator).to(dtype).to(memory_format=torch.channels_last)
    gradient = torch.randn(5, 7, generator=generator).to(dtype)
    found = []
    for pool in (GlobalMaxPool(), nn.AdaptiveMaxPool2d(1)):
        images = values.clone().requires_grad_()
        largest = pool(images).flatten(1)
        largest.backward(gradient)
        found.append((largest, images.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
