"""Batched augmentation on the training device.

Randomness is a function of (seed, epoch, position in the epoch). An augmentation draws its parameters for all positions
of an epoch; each rank takes the rows of its own images. So one rank and N ranks see the same pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Protocol

import torch
from annotated_types import Ge, Le
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.nn import functional as F

from cifar_exp.data.keyed_rng import keyed_generator

Probability = Annotated[float, Ge(0), Le(1)]


class Augmentation(Protocol):
    """The interface of ``conf/augment``: a small picklable object."""

    def parameters(self, order: Tensor, seed: int, epoch: int) -> Tensor:
        """Draw a row for each position of the epoch: (N, K) float32. ``order``: (N,) the image at each position."""
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
    """Random flip and translation by whole pixels, filled with black: the usual "pad and crop".

    Attributes:
        max_pixels: shifts on each axis are drawn from -max_pixels ... max_pixels.
        flip_probability: of a horizontal flip.
    """

    max_pixels: Annotated[int, Ge(0)]
    flip_probability: Probability

    def parameters(self, order: Tensor, seed: int, epoch: int) -> Tensor:
        flip, shift = _flip_and_shift(len(order), self.flip_probability, seed, epoch)
        return torch.cat([flip, (shift * (2 * self.max_pixels + 1)).floor() - self.max_pixels], 1)

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Output pixel (y, x) is input pixel (y - dy, x - dx), columns mirrored where the flip is 1."""
        flip, dx, dy = parameters.long().unbind(1)
        padded = _padded(_mirrored(images, flip), self.max_pixels)
        return _windows(padded, self.max_pixels - dy, self.max_pixels - dx, images.shape[2:])


@dataclass(frozen=True)
class Alternating:
    """Flips in every other epoch, and random translation by whole pixels with reflected borders.

    Half of the images, drawn once for the run, are flipped in odd epochs, the other half in even ones. So two
    consecutive epochs contain each image flipped and not flipped. With random flips half of the images repeat one
    orientation (Jordan 2024, arXiv:2404.00498, section 3.6).

    Attributes:
        max_pixels: shifts on each axis are drawn from -max_pixels ... max_pixels.
    """

    max_pixels: Annotated[int, Ge(0)]

    def parameters(self, order: Tensor, seed: int, epoch: int) -> Tensor:
        odd_epochs = torch.randint(0, 2, (len(order),), generator=keyed_generator(seed, "alternating flips"))
        flip = (odd_epochs[order] + epoch + 1) % 2
        draws = torch.rand(len(order), 2, generator=keyed_generator(seed, "augment", epoch))
        shift = (draws * (2 * self.max_pixels + 1)).floor() - self.max_pixels
        return torch.cat([flip[:, None], shift], 1)

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Output pixel (y, x) is input pixel (y - dy, x - dx), columns mirrored where the flip is 1."""
        flip, dx, dy = parameters.long().unbind(1)
        margin, device = self.max_pixels, images.device
        rows, columns = (
            _reflected(torch.arange(-margin, size + margin, device=device), size) for size in images.shape[2:]
        )
        padded = _mirrored(images, flip).index_select(1, rows).index_select(2, columns)
        return _windows(padded, margin - dy, margin - dx, images.shape[2:])


def _reflected(places: Tensor, size: int) -> Tensor:
    """Indices beyond the border reflected at the outermost pixels: -2 -> 2, ``size`` + 1 -> ``size`` - 3."""
    period = max(1, 2 * (size - 1))
    places = places % period
    return torch.minimum(places, period - places)


@dataclass(frozen=True)
class Shift:
    """The augmentation of the reference recipe: random horizontal flip, then sub-pixel (bilinear) translation with zero
    padding.

    It follows MATLAB's imageDataAugmenter with RandXReflection, RandXTranslation and RandYTranslation: distances are
    drawn uniformly and continuously (documentation of imageDataAugmenter).

    Attributes:
        max_pixels: distances on each axis are drawn uniformly from [-max_pixels, max_pixels].
        flip_probability: of a horizontal flip.
    """

    max_pixels: Annotated[float, Ge(0)]
    flip_probability: Probability

    def parameters(self, order: Tensor, seed: int, epoch: int) -> Tensor:
        flip, shift = _flip_and_shift(len(order), self.flip_probability, seed, epoch)
        return torch.cat([flip, (2 * shift - 1) * self.max_pixels], 1)

    def __call__(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Output pixel (y, x) is the input at (y - dy, x - dx), columns mirrored where the flip is 1."""
        flip, dx, dy = parameters.unbind(1)
        margin = math.ceil(self.max_pixels)
        # Each output pixel interpolates two neighbours per axis, with the same weights all over the image.
        top, left = (-dy).floor(), (-dx).floor()
        down, right = (-dy - top).view(-1, 1, 1, 1), (-dx - left).view(-1, 1, 1, 1)
        padded = _padded(_mirrored(images, flip.long()), margin, more=1)
        height, width = images.shape[2:]
        pixels = _windows(padded, margin + top.long(), margin + left.long(), (height + 1, width + 1)).float()
        rows = torch.lerp(pixels[:, :, :-1], pixels[:, :, 1:], down)
        return torch.lerp(rows[..., :-1], rows[..., 1:], right)


def _mirrored(images: Tensor, flip: Tensor) -> Tensor:
    """Images, flipped horizontally where ``flip`` (B,) is 1: (B, 3, H, W) -> (B, H, W, 3)."""
    images = images.contiguous(memory_format=torch.channels_last)
    both = torch.cat([images, images.flip(3)]).permute(0, 2, 3, 1)
    return both.index_select(0, torch.arange(len(images), device=images.device) + flip * len(images))


def _padded(images: Tensor, margin: int, more: int = 0) -> Tensor:
    """(B, H, W, 3) with ``margin`` black pixels on each side, and ``more`` further ones below and at the right."""
    return F.pad(images, (0, 0, margin, margin + more, margin, margin + more))


def _windows(images: Tensor, top: Tensor, left: Tensor, size: Sequence[int]) -> Tensor:
    """The part of each image (B, H, W, 3) that begins at ``top``, ``left`` (B,) int64 -> (B, 3, *size)."""
    height, width = size
    batch = torch.arange(len(images), device=images.device)
    if images.device.type == "cpu":
        # On CPUs torch gathers byte by byte (15 us an image), numpy copies whole rows (1 us).
        windows = sliding_window_view(images.numpy(), (height, width, images.shape[3]), axis=(1, 2, 3))[:, :, :, 0]
        return torch.from_numpy(windows[batch.numpy(), top.numpy(), left.numpy()]).permute(0, 3, 1, 2)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    return images[batch[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
