"""The interface of a dataset on disk: splits, classes, channel statistics."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar_exp.data.image_reader import Preprocessing
from cifar_exp.data.presence import SplitName
from cifar_exp.errors import StorageError

Arrays = dict[SplitName, tuple[NDArray[np.uint8], NDArray[np.int64]]]
"""Split -> images (N, 3, H, W) uint8, labels (N,) int64."""
Residency = Literal["auto", "device", "host", "loader"]
"""Where training images are stored: in device memory, in host memory, or in their files; see ``sources.py``."""


@dataclass(frozen=True)
class Split:
    """Images of one split in the memory of one device. It is a ``Source`` (``sources.py``) whose draws are indices.

    Attributes:
        images: (N, 3, H, W) uint8, channels-last: the pixels of an image are contiguous.
        labels: (N,) int64, each an index into the dataset's classes.
    """

    images: Tensor
    labels: Tensor

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.images.device

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.images.shape[2], self.images.shape[3]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        """The same images on ``device``; not copied if they are already there."""
        return Split(self.images.to(device), self.labels.to(device))

    def draws(self, order: Tensor, parts: Sequence[slice]) -> Iterator[tuple[Tensor]]:
        """The indices (B,) int64 of each part of ``order``, on the device."""
        order = order.to(self.device)  # one copy an epoch: a copy a step would synchronize with the device
        return ((order[part],) for part in parts)

    def pick(self, draw: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The images (B, 3, H, W) uint8, channels-last, and labels (B,) int64 of a draw."""
        (indices,) = draw
        rows = self.images.permute(0, 2, 3, 1).index_select(0, indices)  # copies contiguous images
        return rows.permute(0, 3, 1, 2), self.labels[indices]


@dataclass(frozen=True)
class DatasetFiles:
    """A decoded dataset on disk; small and picklable.

    Attributes:
        folder: absolute folder of the arrays.
        classes: class names by label, sorted.
        train_count: training images, without the validation split.
        test_count: test images.
        image_size: height and width in pixels.
        mean: of each channel over the training set, validation split included, 0 to 255.
        std: population standard deviation of each channel over the same pixels, 0 to 255.
        content_hash: sha256 in hex of the content that the arrays were made from.
        residency: ``device`` copies the images to the training device, ``host`` leaves them in host memory, ``auto``
            chooses between the two by the device's free memory. ``loader`` reads files and needs ``ImageFiles``.
        validation_count: training images that are held out as the validation split (``validation_split.py``).
        skipped: the files of the source that are not used, in one line; empty if all are used.
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
    skipped: str = ""

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing that makes a file like the images of this dataset."""
        return Preprocessing(self.image_size)

    def load(self, split: SplitName) -> Split:
        """One split, memory-mapped: processes that load it share the page cache.

        Raises:
            StorageError: the cache is missing or unreadable.
        """
        images_name, _ = array_names(split)
        return Split(torch.from_numpy(self._mapped(images_name)).permute(0, 3, 1, 2), self.labels(split))

    def labels(self, split: SplitName) -> Tensor:
        """Labels of one split, (N,) int64, memory-mapped; no image is read.

        Raises:
            StorageError: the cache is missing or unreadable.
        """
        _, labels_name = array_names(split)
        return torch.from_numpy(self._mapped(labels_name))

    def _mapped(self, name: str) -> NDArray[Any]:
        try:
            # Copy-on-write: torch wants a writable array, and the file must not change.
            array: NDArray[Any] = np.load(self.folder / name, mmap_mode="c")
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{self.folder} cannot be read: {error}. Start again: the cache is written again."
            ) from error
        return array


def array_names(split: SplitName) -> tuple[str, str]:
    """File names of a split's images and labels."""
    return f"{split}_images.npy", f"{split}_labels.npy"
