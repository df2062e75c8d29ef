"""Augmentation moves each pixel as a slow loop does, by distances with the documented key and distribution."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar_exp.data.augment import Alternating, Crop, Identity, Shift
from tests.helpers.defaults import with_defaults

ALTERNATING, CROP, SHIFT = (with_defaults(kind)() for kind in (Alternating, Crop, Shift))
SHAPE = (3, 7, 5)  # channels, height, width: not square, so that mixing them up shows
MANY = torch.arange(50_000)


def images(count: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)


def slow_pixel(image: NDArray[Any], flip: bool, y: int, x: int) -> NDArray[np.float64]:
    """A pixel of an image, which is mirrored first where asked; black outside."""
    _, height, width = image.shape
    if not (0 <= y < height and 0 <= x < width):
        return np.zeros(3)
    return image[:, y, width - 1 - x if flip else x].astype(np.float64)


def slow_crop(image: NDArray[Any], flip: bool, dx: int, dy: int) -> NDArray[np.float64]:
    moved = np.empty(image.shape)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            moved[:, y, x] = slow_pixel(image, flip, y - dy, x - dx)
    return moved


def slow_shift(image: NDArray[Any], flip: bool, dx: float, dy: float) -> NDArray[np.float64]:
    """Bilinear between the four neighbours of the place that a pixel comes from, in float64."""
    moved = np.zeros(image.shape)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            top, left = math.floor(y - dy), math.floor(x - dx)
            down, right = y - dy - top, x - dx - left
            moved[:, y, x] = (1 - down) * (1 - right) * slow_pixel(image, flip, top, left)
            moved[:, y, x] += (1 - down) * right * slow_pixel(image, flip, top, left + 1)
            moved[:, y, x] += down * (1 - right) * slow_pixel(image, flip, top + 1, left)
            moved[:, y, x] += down * right * slow_pixel(image, flip, top + 1, left + 1)
    return moved


def test_crop_equals_a_loop_over_pixels() -> None:
    """Every distance of -4 ... 4 on both axes, flipped and not; the dtype stays uint8."""
    grid = [(flip, dx, dy) for flip in (0, 1) for dx in range(-4, 5) for dy in range(-4, 5)]
    given = images(len(grid))
    moved = CROP(given, torch.tensor(grid).float())
    assert moved.dtype == torch.uint8
    for image, result, (flip, dx, dy) in zip(given.numpy(), moved.numpy(), grid, strict=True):
        np.testing.assert_array_equal(result, slow_crop(image, bool(flip), dx, dy))


@pytest.mark.parametrize("shape", [SHAPE, (3, 5, 9), (3, 8, 8)])
def test_shift_equals_a_loop_over_pixels(shape: tuple[int, ...]) -> None:
    given = images(32, shape)
    parameters = SHIFT.parameters(torch.arange(32), seed=0, epoch=1)
    parameters[0] = torch.tensor([0, 4.0, -4.0])
    parameters[1] = torch.tensor([1, -4.0, 4.0])
    assert set(parameters[:, 0].tolist()) == {0, 1}
    moved = SHIFT(given, parameters)
    assert moved.dtype == torch.float32
    for image, result, (flip, dx, dy) in zip(given.numpy(), moved.numpy(), parameters.tolist(), strict=True):
        np.testing.assert_allclose(result, slow_shift(image, bool(flip), dx, dy), atol=1e-3)


def test_shift_of_the_training_size_is_as_exact() -> None:
    given = images(4, (3, 32, 32))
    parameters = torch.tensor([[0, 3.99, -3.99], [1, -0.001, 2.5], [1, 1.75, -1.125], [0, 0.0, 0.0]])
    moved = SHIFT(given, parameters)
    for image, result, (flip, dx, dy) in zip(given.numpy(), moved.numpy(), parameters.tolist(), strict=True):
        np.testing.assert_allclose(result, slow_shift(image, bool(flip), dx, dy), atol=1e-3)


def test_shift_by_whole_pixels_equals_crop() -> None:
    given = images(64, (3, 32, 32))
    parameters = CROP.parameters(torch.arange(64), seed=3, epoch=2)
    torch.testing.assert_close(SHIFT(given, parameters), CROP(given, parameters).float(), atol=2e-3, rtol=0)


def test_alternating_equals_a_loop_over_pixels() -> None:
    """Every distance of -4 ... 4 on both axes, flipped and not; padding is a reflection."""
    grid = [(flip, dx, dy) for flip in (0, 1) for dx in range(-4, 5) for dy in range(-4, 5)]
    given = images(len(grid))
    moved = Alternating(4)(given, torch.tensor(grid).float())
    assert moved.dtype == torch.uint8
    for image, result, (flip, dx, dy) in zip(given.numpy(), moved.numpy(), grid, strict=True):
        padded = np.pad(image, ((0, 0), (4, 4), (4, 4)), mode="reflect")
        shifted = padded[:, 4 - dy : 4 - dy + SHAPE[1], 4 - dx : 4 - dx + SHAPE[2]]
        mirrored = padded[:, :, ::-1][:, 4 - dy : 4 - dy + SHAPE[1], 4 - dx : 4 - dx + SHAPE[2]]
        np.testing.assert_array_equal(result, mirrored if flip else shifted)


def test_alternating_mirrors_each_image_in_exactly_every_other_epoch() -> None:
    """Whatever place the epoch's order gives it; half of the images in odd epochs, and not the same half by seed."""
    flips = []
    for epoch in (1, 2, 3, 4):
        order = torch.randperm(10_000, generator=torch.Generator().manual_seed(epoch))
        flip = torch.empty(10_000)
        flip[order] = ALTERNATING.parameters(order, seed=0, epoch=epoch)[:, 0]
        flips.append(flip)
    assert set(flips[0].tolist()) == {0.0, 1.0}
    assert torch.equal(flips[1], 1 - flips[0])
    assert torch.equal(flips[2], flips[0])
    assert torch.equal(flips[3], flips[1])
    assert float(flips[0].mean()) == pytest.approx(0.5, abs=0.02)
    other = ALTERNATING.parameters(torch.arange(10_000), seed=1, epoch=1)[:, 0]
    assert float((other == flips[0]).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_alternatings_distances_are_whole_uniform_and_new_in_each_epoch() -> None:
    first, second = (ALTERNATING.parameters(MANY, seed=0, epoch=epoch)[:, 1:] for epoch in (1, 2))
    for distances in first.T:
        values, counts = distances.unique(return_counts=True)
        assert values.tolist() == list(range(-2, 3))
        assert counts.tolist() == pytest.approx([len(MANY) / 5] * 5, rel=0.05)
    assert float((first == second).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert abs(torch.corrcoef(first.T)[0, 1]) < 0.02


def test_identity_returns_the_images() -> None:
    given = images(3)
    parameters = Identity().parameters(torch.arange(3), seed=0, epoch=1)
    assert parameters.shape == (3, 0)
    assert torch.equal(Identity()(given, parameters), given)


def test_crops_distances_are_whole_and_uniform_over_minus_4_to_4() -> None:
    parameters = CROP.parameters(MANY, seed=0, epoch=1)
    for distances in parameters[:, 1:].T:
        assert torch.equal(distances, distances.round())
        values, counts = distances.unique(return_counts=True)
        assert values.tolist() == list(range(-4, 5))
        assert counts.tolist() == pytest.approx([len(MANY) / 9] * 9, rel=0.05)


def test_shifts_distances_are_continuous_and_uniform_over_minus_4_to_4() -> None:
    parameters = SHIFT.parameters(MANY, seed=0, epoch=1)
    for distances in parameters[:, 1:].T:
        assert -4 <= distances.min() < -3.99
        assert 3.99 < distances.max() <= 4
        assert len(distances.unique()) > 0.99 * len(MANY)
        quantiles = distances.sort().values
        line = torch.linspace(-4, 4, len(MANY))
        assert (quantiles - line).abs().max() < 0.08  # Kolmogorov-Smirnov: 0.01 of the range


@pytest.mark.parametrize("augmentation", [Crop(max_pixels=2, flip_probability=0.25), Shift(2.0, 0.25)])
def test_settings_bound_the_distances_and_the_flips(augmentation: Crop | Shift) -> None:
    parameters = augmentation.parameters(MANY, seed=0, epoch=1)
    assert parameters[:, 1:].abs().max() <= 2
    assert parameters[:, 1:].abs().max() > 1.99
    assert set(parameters[:, 0].tolist()) == {0, 1}
    assert float(parameters[:, 0].mean()) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("augmentation", [CROP, SHIFT])
def test_flip_and_both_distances_are_independent_for_every_image(augmentation: Crop | Shift) -> None:
    parameters = augmentation.parameters(MANY, seed=0, epoch=1)
    assert float(parameters[:, 0].mean()) == pytest.approx(0.5, abs=0.01)
    correlations = torch.corrcoef(parameters.T) - torch.eye(3)
    assert correlations.abs().max() < 0.02
    neighbours = torch.corrcoef(torch.stack([parameters[:-1, 1], parameters[1:, 1]]))
    assert abs(neighbours[0, 1]) < 0.02


@pytest.mark.parametrize(("probability", "flips"), [(0.0, {0.0}), (1.0, {1.0})])
@pytest.mark.parametrize("kind", [Crop, Shift])
def test_flips_never_or_always(kind: type[Crop | Shift], probability: float, flips: set[float]) -> None:
    parameters = with_defaults(kind)(flip_probability=probability).parameters(MANY, seed=0, epoch=1)
    assert set(parameters[:, 0].tolist()) == flips


@pytest.mark.parametrize("kind", [Crop, Shift])
def test_no_distance_and_no_flip_return_the_images(kind: type[Crop | Shift]) -> None:
    given = images(9)
    still = kind(0, 0.0)
    result = still(given, still.parameters(torch.arange(9), seed=1, epoch=1)).float()
    torch.testing.assert_close(result, given.float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("augmentation", [CROP, SHIFT, ALTERNATING])
def test_parameters_are_a_function_of_seed_and_epoch_alone(augmentation: Crop | Shift | Alternating) -> None:
    order = torch.arange(100)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = augmentation.parameters(order, seed=4, epoch=2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(augmentation.parameters(order, seed=4, epoch=2), first)
    assert not torch.equal(augmentation.parameters(order, seed=5, epoch=2), first)
    assert not torch.equal(augmentation.parameters(order, seed=4, epoch=3), first)
