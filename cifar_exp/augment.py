"""Batched augmentation on the training device.

Randomness is a function of (seed, epoch, global position): an augmentation first lays out its parameters for every
position of the epoch, and each rank takes the rows of the images it trains on. So 1 and N ranks see the same pixels.
"""

from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.nn import functional as F

from cifar_exp.rng import keyed_generator

Probability = Annotated[float, Ge(0), Le(1)]


class Augmentation(Protocol):
    """What `_target_` of ``conf/augment`` is: a small picklable object."""

    def parameters(self, order: Tensor, seed: int, epoch: int) -> Tensor:
        """One row a position of the epoch: (N, K) float32. ``order``: (N,) the image at each position."""
        ...

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """``images``: (B, 3, H, W) uint8, ``parameters``: (B, K) -> (B, 3, H, W) uint8 or float32 in 0..255."""
        ...


def _flip_and_shift(count: int, flip_probability: float, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Uniform draws for ``count`` positions: flip (N, 1) as 0 or 1, shift (N, 2) in [0, 1)."""
    draws = torch.rand(count, 3, generator=keyed_generator(seed, "augment", epoch))
    return (draws[:, :1] < flip_probability).float(), draws[:, 1:]


@dataclass(frozen=True)
class Identity:
    """No augmentation."""

    def parameters(self, order: Tensor, seed: int, epoch: int) -> Tensor:  # noqa: ARG002
        return torch.empty(len(order), 0)

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:  # noqa: ARG002
        return images


@dataclass(frozen=True)
class Crop:
    """Reflection and translation by whole pixels, filled with black; the usual "pad and crop".

    Attributes:
        max_pixels: shifts on each axis are drawn from -max_pixels ... max_pixels.
        flip_probability: of a horizontal reflection.
    """

    max_pixels: Annotated[int, Ge(0)] = 4
    flip_probability: Probability = 0.5

    def parameters(self, order: Tensor, seed: int, epoch: int) -> Tensor:
        flip, shift = _flip_and_shift(len(order), self.flip_probability, seed, epoch)
        return torch.cat([flip, (shift * (2 * self.max_pixels + 1)).floor() - self.max_pixels], 1)

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Output pixel (y, x) is input pixel (y - dy, x - dx), columns mirrored where the flip is 1."""
        count, _, height, width = images.shape
        flip, dx, dy = parameters.long().unbind(1)
        pad = self.max_pixels
        padded = F.pad(images, (pad, pad, pad, pad))
        rows = torch.arange(height, device=images.device) + pad - dy[:, None]
        columns = torch.arange(width, device=images.device) + pad - dx[:, None]
        columns = torch.where(flip[:, None] == 1, width + 2 * pad - 1 - columns, columns)
        batch = torch.arange(count, device=images.device)[:, None, None]
        # One gather over pixels (channels last) instead of two over rows and columns.
        return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Alternating:
    """Reflection in every other epoch instead of at random, and translation by whole pixels with mirrored borders.

    Half of the images, drawn once for the run, are mirrored in odd epochs, the other half in even ones. So any two
    epochs in a row show both sides of every image, where random flips show a quarter of them one side twice and
    another quarter the other (Jordan 2024, arXiv:2404.00498, section 3.6).

    Attributes:
        max_pixels: shifts on each axis are drawn from -max_pixels ... max_pixels.
    """

    max_pixels: Annotated[int, Ge(0)] = 2

    def parameters(self, order: Tensor, seed: int, epoch: int) -> Tensor:
        odd_epochs = torch.randint(0, 2, (len(order),), generator=keyed_generator(seed, "alternating flips"))
        flip = (odd_epochs[order] + epoch + 1) % 2
        draws = torch.rand(len(order), 2, generator=keyed_generator(seed, "augment", epoch))
        shift = (draws * (2 * self.max_pixels + 1)).floor() - self.max_pixels
        return torch.cat([flip[:, None], shift], 1)

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Output pixel (y, x) is input pixel (y - dy, x - dx), columns mirrored where the flip is 1."""
        count, _, height, width = images.shape
        flip, dx, dy = parameters.long().unbind(1)
        rows = _reflected(torch.arange(height, device=images.device) - dy[:, None], height)
        columns = _reflected(torch.arange(width, device=images.device) - dx[:, None], width)
        columns = torch.where(flip[:, None] == 1, width - 1 - columns, columns)
        batch = torch.arange(count, device=images.device)[:, None, None]
        return images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _reflected(places: Tensor, size: int) -> Tensor:
    """Places beyond the border, as -2 or ``size`` + 1, seen in a mirror on the outermost pixel: 2 or ``size`` - 3."""
    return (size - 1) - ((size - 1) - places.abs()).abs()


@dataclass(frozen=True)
class Shift:
    """The reference's: reflection, then translation by real-valued distances, bilinear, filled with black.

    As MATLAB's imageDataAugmenter with RandXReflection, RandXTranslation and RandYTranslation, whose distances are
    drawn uniformly and continuously (documentation of imageDataAugmenter).

    Attributes:
        max_pixels: distances on each axis are drawn uniformly from [-max_pixels, max_pixels].
        flip_probability: of a horizontal reflection.
    """

    max_pixels: Annotated[float, Ge(0)] = 4.0
    flip_probability: Probability = 0.5

    def parameters(self, order: Tensor, seed: int, epoch: int) -> Tensor:
        flip, shift = _flip_and_shift(len(order), self.flip_probability, seed, epoch)
        return torch.cat([flip, (2 * shift - 1) * self.max_pixels], 1)

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Output pixel (y, x) is the input at (y - dy, x - dx), columns mirrored where the flip is 1."""
        height, width = images.shape[2:]
        flip, dx, dy = parameters.unbind(1)
        sign = 1 - 2 * flip
        # affine_grid maps output to input coordinates in [-1, 1] over the image's width; pixels are `2 / size` apart.
        theta = images.new_zeros(len(images), 2, 3, dtype=torch.float32)
        theta[:, 0, 0] = sign
        theta[:, 0, 2] = -sign * dx * 2 / width
        theta[:, 1, 1] = 1
        theta[:, 1, 2] = -dy * 2 / height
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
