"""Where images are stored during training, and how they are copied to the training device.

They are in device memory (``Split``), in host memory (:class:`HostSource`) or in their files (``FileSource``). The same
order gives the same images and labels from each.
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
from cifar_exp.data.image_files import LoaderFiles
from cifar_exp.data.prefetch import prefetched
from cifar_exp.system.accelerator import free_bytes, supports_async_copies

PREFETCHED_STEPS = 3  # steps ahead: enough to hide a slow batch
MAX_DEVICE_SHARE = 0.5  # of a device's free memory for images; activations need the rest


class Source(Protocol):
    """The interface of all sources: the images of one split."""

    @property
    def device(self) -> torch.device:
        """The device of draws, images and labels."""
        ...

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        ...

    def __len__(self) -> int:
        """Number of images."""
        ...

    def draws(self, order: Tensor, parts: Sequence[slice]) -> Iterator[tuple[Tensor, ...]]:
        """Yield a draw for each part of ``order`` ((N,) int64, on the host): the tensors for :meth:`pick`.

        The next parts may be prefetched.

        Raises:
            DataError: an image cannot be read.
        """
        ...

    def pick(self, draw: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The images (B, 3, H, W) uint8, channels-last, and labels (B,) int64 of a draw."""
        ...


@dataclass(frozen=True)
class ForwardingSource:
    """A source that wraps another one. Subclasses change a part of it.

    Attributes:
        source: the wrapped source.
    """

    source: Source

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def image_size(self) -> tuple[int, int]:
        return self.source.image_size

    def __len__(self) -> int:
        return len(self.source)

    def draws(self, order: Tensor, parts: Sequence[slice]) -> Iterator[tuple[Tensor, ...]]:
        return self.source.draws(order, parts)

    def pick(self, draw: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return self.source.pick(draw)


def fetch(source: Source, places: Tensor) -> tuple[Tensor, Tensor]:
    """The images (B, 3, H, W) uint8 and labels (B,) int64 at ``places`` (B,) int64, on the source's device."""
    (draw,) = source.draws(places, [slice(0, len(places))])
    return source.pick(draw)


@contextmanager
def open_sources(files: DatasetFiles, device: torch.device, threads: int) -> Iterator[tuple[Source, Source]]:
    """Training and test images for ``device``.

    Args:
        files: the dataset; its ``residency`` says where the images are stored during training.
        device: the training device.
        threads: CPU threads of this rank, the limit of ``workers=auto``.
    """
    if isinstance(files, LoaderFiles):
        with opened_files(files, device, threads) as sources:
            yield sources
        return
    train, test = files.load("train"), files.load("test")
    if residency_on(device, files.residency, train.images.nbytes) == "host":
        yield HostSource(train, device), HostSource(test, device)
    else:
        yield train.to(device), test.to(device)


def residency_on(device: torch.device, choice: Residency, images_bytes: int) -> Residency:
    """Resolve ``auto`` for a training set of this size in bytes; other choices are returned unchanged.

    On the CPU ``device`` copies nothing: images are memory-mapped, one copy for all ranks.
    """
    if choice != "auto":
        return choice
    if images_bytes > MAX_DEVICE_SHARE * free_bytes(device):
        return "host"
    return "device"


@dataclass(frozen=True)
class HostSource:
    """Images in host memory. A thread gathers the images of the next few steps.

    Attributes:
        split: the images, on the host.
        device: the training device.
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
        places, is_async = order.numpy(), supports_async_copies(self.device)
        rows = prefetched((self._gathered(places[part]) for part in parts), PREFETCHED_STEPS, self._enter_thread)
        for part, images in zip(parts, rows, strict=True):
            yield images.to(self.device, non_blocking=is_async).permute(0, 3, 1, 2), labels[part]

    def pick(self, draw: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        images, labels = draw
        return images, labels

    def _gathered(self, places: np.ndarray) -> Tensor:
        """(B, H, W, 3) uint8 on the host, pinned if a GPU copies it."""
        images = self.split.images.permute(0, 2, 3, 1).numpy()
        rows = torch.empty(
            len(places), *images.shape[1:], dtype=torch.uint8, pin_memory=supports_async_copies(self.device)
        )
        # numpy copies with one thread; torch would compete with the step for all threads of the rank. Without `clip`
        # numpy copies twice.
        np.take(images, places, axis=0, out=rows.numpy(), mode="clip")
        return rows

    def _enter_thread(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(
                self.device
            )  # a new thread uses the first GPU, and pinning would allocate memory there
