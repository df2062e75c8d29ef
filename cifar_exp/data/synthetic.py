"""Synthetic images: shapes filled with textures, the same bytes on every machine.

Random numbers are uniform floats and bytes, and the arithmetic uses only operations that IEEE 754 rounds the same way
everywhere: no sines, no normal deviates.
"""

import hashlib
from dataclasses import replace
from functools import cache as cached
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cifar_exp.data.array_cache import Decoded, check_decoded, expanded, prepare
from cifar_exp.data.dataset_files import Arrays, DatasetFiles
from cifar_exp.data.presence import SPLITS
from cifar_exp.errors import ConfigError

VERSION = 1  # increase it whenever the images change
_SHAPES = ("cross", "disc", "ring", "square", "triangle")
CLASSES = tuple(f"{shape}-{texture}" for shape in _SHAPES for texture in ("checks", "stripes"))
_NOISE = 16.0  # largest change of a pixel by noise


def draw_arrays(train_count: int, test_count: int, num_classes: int, image_size: int, seed: int) -> Arrays:
    """Both splits, of the first ``num_classes`` of ``CLASSES``, in balanced classes."""
    return {
        split: _draw_split(count, num_classes, image_size, np.random.PCG64([seed, number]))
        for number, (split, count) in enumerate(zip(SPLITS, (train_count, test_count), strict=True))
    }


def _draw_split(
    count: int, num_classes: int, image_size: int, bits: np.random.PCG64
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (count, 3, S, S) uint8 and balanced labels in random order."""
    rng = np.random.Generator(bits)
    labels = np.argsort(rng.random(count), kind="stable") % num_classes
    images = np.empty((count, 3, image_size, image_size), dtype=np.uint8)
    for start in range(0, count, 1024):  # in chunks that fit the processor's cache
        images[start : start + 1024] = _draw(labels[start : start + 1024], image_size, rng)
    return images, labels.astype(np.int64)


def _draw(labels: NDArray[np.int64], image_size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Images (N, 3, S, S), 0 to 255: background + mask * texture * contrast + noise."""

    def uniform(low: float, high: float, channels: int = 1) -> NDArray[np.float32]:
        numbers = low + (high - low) * rng.random((len(labels), channels, 1, 1))
        return numbers.astype(np.float32)

    unit = np.float32(image_size / 32)  # lengths are for images of 32 pixels
    centres = np.arange(image_size, dtype=np.float32) + np.float32(0.5)
    x = centres[None, None, None, :] - uniform(12, 20) * unit
    y = centres[None, None, :, None] - uniform(12, 20) * unit
    mask = _shape_mask(x, y, uniform(7.5, 10.5) * unit, labels[:, None, None, None] // 2)
    period = uniform(2, 3.5) * unit
    columns, rows = (np.floor((along + uniform(0, 8) * unit) / period).astype(np.int32) & 1 for along in (x, y))
    stripes = np.where(uniform(0, 1) < 0.5, columns, rows)  # horizontal or vertical
    texture = np.where(labels[:, None, None, None] % 2 == 0, columns ^ rows, stripes)
    # Either sign for each channel: the mean image of a class is flat, so a linear model cannot learn it.
    contrast = uniform(50, 100, 3) * np.where(uniform(0, 1, 3) < 0.5, -1, 1).astype(np.float32)
    background = uniform(80, 176, 3)
    noise = rng.integers(0, 256, (len(labels), 3, image_size, image_size), dtype=np.uint8).astype(np.float32)
    pattern = (mask * (2 * texture - 1)).astype(np.float32)
    images = background + pattern * contrast + (noise - np.float32(127.5)) * np.float32(_NOISE / 127.5)
    clipped: NDArray[np.float32] = np.clip(images, 0, 255)
    return clipped


def _shape_mask(
    x: NDArray[np.float32], y: NDArray[np.float32], radius: NDArray[np.float32], shapes: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which pixels lie in the shape: (N, 1, S, S), for offsets x, y from its centre and an index into ``_SHAPES``.

    Every shape is its own mirror image, so that a horizontal flip keeps the class.
    """
    across, down = np.abs(x), np.abs(y)
    far, near, square = np.maximum(across, down), np.minimum(across, down), x * x + y * y
    disc = square <= radius * radius
    choices = {
        "cross": (far <= radius) & (near <= 0.34 * radius),
        "disc": disc,
        "ring": disc & (square >= 0.3 * radius * radius),
        "square": far <= 0.85 * radius,
        "triangle": (y <= 0.8 * radius) & (across <= 0.55 * (y + radius)),
    }
    return np.choose(shapes, [choices[name] for name in _SHAPES])


def synthetic(
    root: str | Path,
    *,
    train_count: int,
    test_count: int,
    num_classes: int,
    image_size: int,
    seed: int,
    residency: Decoded,
) -> DatasetFiles:
    """Generated images of shapes filled with textures. A convolutional network learns them, a linear model does not.

    Position, size, colours, contrast, phase and noise are random. A horizontal flip or a shift by an eighth of the
    image does not change the class. The same settings give the same bytes on every machine.

    Args:
        root: folder of the array cache.
        train_count: training images, in balanced classes.
        test_count: test images, in balanced classes.
        num_classes: 2 to 10.
        image_size: height and width in pixels, 16 to 256.
        seed: of the random numbers.
        residency: where the images lie while ranks train, as in ``DatasetFiles``.

    Raises:
        ConfigError: a setting is out of its range.
        StorageError: ``root`` cannot be written.
    """
    check_decoded(residency)
    _check_range("train_count", train_count, num_classes, 10**7)
    _check_range("test_count", test_count, num_classes, 10**7)
    _check_range("num_classes", num_classes, 2, len(CLASSES))
    _check_range("image_size", image_size, 16, 256)
    _check_range("seed", seed, 0, 2**63 - 1)

    @cached
    def draw() -> Arrays:
        return draw_arrays(train_count, test_count, num_classes, image_size, seed)

    recipe = f"synthetic {VERSION} {train_count} {test_count} {num_classes} {image_size} {seed}"
    files = prepare(
        expanded(root).absolute(),
        fingerprint=recipe,
        content_hash=lambda: _content_hash(draw()),
        decode=lambda: (CLASSES[:num_classes], draw()),
        setting="data.root",
    )
    return replace(files, residency=residency)


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or not low <= value <= high:
        valid = min(max(value, low), high) if isinstance(value, int) else low
        raise ConfigError(
            f"data.{name}={value} must be a whole number from {low:,} to {high:,}. Set data.{name}={valid}"
        )


def _content_hash(arrays: Arrays) -> str:
    """sha256 in hex of all images and labels."""
    digest = hashlib.sha256()
    for images, labels in arrays.values():
        digest.update(images.data)
        digest.update(labels.data)
    return digest.hexdigest()
