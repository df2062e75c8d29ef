"""A data set on disk as the rest of the package sees it: splits, classes, statistics."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar_exp.errors import StorageError

SplitName = Literal["train", "test"]
SPLITS: tuple[SplitName, SplitName] = ("train", "test")
Arrays = dict[SplitName, tuple[NDArray[np.uint8], NDArray[np.int64]]]
"""Split -> images (N, 3, H, W) uint8, labels (N,) int64."""
Residency = Literal["auto", "device", "host", "loader"]
"""Where training images lie: on the training device, in host memory, or in their files; see ``residency.py``."""


@dataclass(frozen=True)
class Split:
    """Images of one split, all on one device; as a ``Source`` (``residency.py``) a draw is where its images lie.

    Attributes:
        images: (N, 3, H, W) uint8, channels-last: each image's pixels lie in one piece.
        labels: (N,) int64, each an index into the dataset's classes.
    """

    images: Tensor
    labels: Tensor

    @property
    def device(self) -> torch.device:
        """Where the images are and come out."""
        return self.images.device

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.images.shape[2], self.images.shape[3]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        """The same images on ``device``; not copied where they are there."""
        return Split(self.images.to(device), self.labels.to(device))

    def draws(self, order: Tensor, parts: Sequence[slice]) -> Iterator[tuple[Tensor]]:
        """The indices (B,) int64 of each part of ``order``, on the device."""
        order = order.to(self.device)  # all at once: a copy a step would make the host wait
        return ((order[part],) for part in parts)

    def pick(self, draw: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The images (B, 3, H, W) uint8, channels-last, and labels (B,) int64 of a draw."""
        (indices,) = draw
        rows = self.images.permute(0, 2, 3, 1).index_select(0, indices)  # whole images in one piece
        return rows.permute(0, 3, 1, 2), self.labels[indices]


@dataclass(frozen=True)
class DatasetFiles:
    """A decoded dataset on disk; small and picklable.

    Attributes:
        folder: where the arrays lie, absolute.
        classes: names by label, sorted.
        train_count: training images, without those kept apart.
        test_count: test images.
        image_size: height and width in pixels.
        mean: of the training set's channels, 0 to 255; images that are kept apart included.
        std: of the same, 0 to 255, over all pixels (population).
        content_hash: sha256 in hex of what the arrays were made from.
        residency: ``device`` copies the images to the training device, ``host`` leaves them in host memory, ``auto``
            chooses between these two by the device's free memory; ``loader`` is for ``ImageFiles`` (``loader.py``).
        validation_count: images of the training set that are kept apart to validate on (``validation.py``).
    """

    folder: Path
    classes: tuple[str, ...]
    train_count: int
    test_count: int
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    content_hash: str
    residency: Residency = "auto"
    validation_count: int = 0

    def load(self, split: SplitName) -> Split:
        """One split whole, mapped and not copied: processes that load it share the page cache.

        Raises:
            StorageError: the cache is gone or cannot be read.
        """
        images_name, _ = _array_names(split)
        return Split(torch.from_numpy(self._mapped(images_name)).permute(0, 3, 1, 2), self.labels(split))

    def labels(self, split: SplitName) -> Tensor:
        """Labels of one split whole, (N,) int64, mapped and not copied; no image is read.

        Raises:
            StorageError: the cache is gone or cannot be read.
        """
        _, labels_name = _array_names(split)
        return torch.from_numpy(self._mapped(labels_name))

    def _mapped(self, name: str) -> NDArray[Any]:
        try:
            # Copy-on-write: torch accepts the array as writable, and nobody can change the file.
            array: NDArray[Any] = np.load(self.folder / name, mmap_mode="c")
        except (OSError, ValueError) as error:
            raise StorageError(f"{self.folder} cannot be read: {error}. Start again, and it is made anew.") from error
        return array


def _array_names(split: SplitName) -> tuple[str, str]:
    return f"{split}_images.npy", f"{split}_labels.npy"
