"""Where images lie while a rank trains, and how they come to the training device.

On the device all the time (``Split``), in host memory (:class:`HostSource`), or in their files (``loader.FileSource``):
the same order gives the same images and labels from each.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cifar_exp.data.dataset_files import DatasetFiles, Residency, Split
from cifar_exp.data.file_source import opened_files
from cifar_exp.data.image_files import ImageFiles
from cifar_exp.data.prefetch import ahead
from cifar_exp.system.accelerator import free_bytes, takes_copies_meanwhile

AHEAD = 3  # steps gathered before they are asked for: enough to hide one that is slow
LARGEST_SHARE = 0.5  # of a device's free memory: the network's activations need the rest


class Source(Protocol):
    """The images of one split, wherever they lie."""

    @property
    def device(self) -> torch.device:
        """Where draws and what is picked from them are."""
        ...

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        ...

    def __len__(self) -> int:
        """How many images there are."""
        ...

    def draws(self, order: Tensor, parts: Sequence[slice]) -> Iterator[tuple[Tensor, ...]]:
        """For each part of ``order`` ((N,) int64, on the host), tensors on the device that :meth:`pick` takes.

        Parts to come may be fetched meanwhile.

        Raises:
            DataError: an image cannot be read.
        """
        ...

    def pick(self, draw: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The images (B, 3, H, W) uint8, channels-last, and labels (B,) int64 of a draw."""
        ...


def fetch(source: Source, places: Tensor) -> tuple[Tensor, Tensor]:
    """The images (B, 3, H, W) uint8 and labels (B,) int64 at ``places`` (B,) int64, on the source's device."""
    (draw,) = source.draws(places, [slice(0, len(places))])
    return source.pick(draw)


@contextmanager
def opened(files: DatasetFiles, device: torch.device, threads: int) -> Iterator[tuple[Source, Source]]:
    """Training and test images for ``device``.

    Args:
        files: the dataset; its ``residency`` says where the images lie meanwhile.
        device: where they are trained on.
        threads: of this rank, which ``workers=auto`` is limited by.
    """
    if isinstance(files, ImageFiles):
        with opened_files(files, device, threads) as sources:
            yield sources
        return
    train, test = files.load("train"), files.load("test")
    if residency_on(device, files.residency, train.images.nbytes) == "host":
        yield HostSource(train, device), HostSource(test, device)
    else:
        yield train.to(device), test.to(device)


def residency_on(device: torch.device, choice: Residency, images_bytes: int) -> Residency:
    """What ``auto`` means for a training set of so many bytes; other choices stay.

    On the CPU nothing is copied: images are mapped from disk, one copy for all ranks.
    """
    if choice != "auto":
        return choice
    if images_bytes > LARGEST_SHARE * free_bytes(device):
        return "host"
    return "device"


@dataclass(frozen=True)
class HostSource:
    """Images that stay in host memory; each step's are gathered there by a thread, a few steps ahead.

    Attributes:
        split: the images, on the host.
        device: where they are trained on.
    """

    split: Split
    device: torch.device

    @property
    def image_size(self) -> tuple[int, int]:
        return self.split.image_size

    def __len__(self) -> int:
        return len(self.split)

    def draws(self, order: Tensor, parts: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        labels = self.split.labels[order].to(self.device)
        places, meanwhile = order.numpy(), takes_copies_meanwhile(self.device)
        rows = ahead((self._gathered(places[part]) for part in parts), AHEAD, self._enter_thread)
        for part, images in zip(parts, rows, strict=True):
            yield images.to(self.device, non_blocking=meanwhile).permute(0, 3, 1, 2), labels[part]

    def pick(self, draw: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        images, labels = draw
        return images, labels

    def _gathered(self, places: np.ndarray) -> Tensor:
        """(B, H, W, 3) uint8 on the host, pinned where a GPU is to copy it."""
        images = self.split.images.permute(0, 2, 3, 1).numpy()
        rows = torch.empty(
            len(places), *images.shape[1:], dtype=torch.uint8, pin_memory=takes_copies_meanwhile(self.device)
        )
        # By numpy, whose copy takes one thread: torch's would compete with the step for all of the rank's. Without
        # `clip` numpy copies twice.
        np.take(images, places, axis=0, out=rows.numpy(), mode="clip")
        return rows

    def _enter_thread(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a thread begins on the first GPU, and pinning would use memory there
