"""Images that are read from their files while training, for data sets larger than memory."""

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cifar_exp.data.image_files import ImageFiles, _sound, read_image
from cifar_exp.errors import MachineError
from cifar_exp.system.process import end_with_parent

MOST_WORKERS = 8  # that `auto` starts a rank


class _Images(Dataset[Tensor | str]):
    """The files of both splits, by place."""

    def __init__(self, root: Path, paths: Sequence[NDArray[np.bytes_]], size: tuple[int, int]) -> None:
        self._root, self._paths, self._size = root, paths, size

    def __getitem__(self, place: int) -> Tensor | str:
        train, test = self._paths
        name = train[place] if place < len(train) else test[place - len(train)]
        return read_image(self._root / os.fsdecode(name), self._size)


class _Requests(Sampler[list[int]]):
    """The batches that are wanted next, set before each pass: the workers stay the same ones."""

    def __init__(self) -> None:
        self.places: Iterable[list[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.places)


def _together(images: list[Tensor | str]) -> Tensor | str:
    """One batch (B, H, W, 3), or the first problem: an exception in a worker would arrive as a traceback."""
    sound = [image for image in images if isinstance(image, Tensor)]
    if len(sound) < len(images):
        return next(image for image in images if isinstance(image, str))
    return torch.stack(sound).permute(0, 2, 3, 1).contiguous()


def _begin_worker(_number: int) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; this process ends with its rank


@dataclass(frozen=True)
class FileSource:
    """The images of one split, read by worker processes in the order in which they are wanted.

    Attributes:
        reader: what reads them.
        first: place of the split's first image in it.
        labels: (N,) int64, on the host.
        image_size: height and width in pixels.
        device: where they are trained on.
    """

    reader: "DataLoader[Tensor | str]"
    first: int
    labels: Tensor
    image_size: tuple[int, int]
    device: torch.device

    def __len__(self) -> int:
        return len(self.labels)

    def draws(self, order: Tensor, parts: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        labels = self.labels[order].to(self.device)
        requests = self.reader.batch_sampler
        assert isinstance(requests, _Requests)
        requests.places = ((order[part] + self.first).tolist() for part in parts)
        for part, images in zip(parts, self.reader, strict=True):
            yield _sound(images).to(self.device, non_blocking=True).permute(0, 3, 1, 2), labels[part]

    def pick(self, draw: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        images, labels = draw
        return images, labels


@contextmanager
def opened_files(files: ImageFiles, device: torch.device, threads: int) -> Iterator[tuple[FileSource, FileSource]]:
    """Training and test images, read by the same worker processes, which end with the block or with this process.

    Raises:
        MachineError: a worker process has died, as where shared memory is too small.
        StorageError: the list of files is gone or cannot be read.
    """
    import torchvision.transforms.v2.functional  # noqa: F401 - before the workers are forked: they need not

    (train, train_labels), (test, test_labels) = files.listed("train"), files.listed("test")
    workers = min(MOST_WORKERS, threads) if files.workers == "auto" else files.workers
    reader = DataLoader(
        _Images(files.root, (train, test), files.image_size),
        batch_sampler=_Requests(),
        num_workers=workers,
        collate_fn=_together,
        pin_memory=device.type == "cuda",
        worker_init_fn=_begin_worker if workers else None,
        persistent_workers=workers > 0,
        # A fork server would be a new one for each rank and import torch again. Forking is safe here: the workers are
        # made before the rank has threads of Python's, and compute with one thread.
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # of seeds that nobody uses; the network's own numbers must not move
    )
    iter(reader)  # makes the workers
    share = (files.image_size, device)
    try:
        yield FileSource(reader, 0, train_labels, *share), FileSource(reader, len(train), test_labels, *share)
    except RuntimeError as error:  # torch has no class for it, and raises it wherever the rank is
        if not str(error).startswith("DataLoader worker"):
            raise
        what = str(error).rstrip(". ")
        raise MachineError(f"data.workers={files.workers}: {what}. Type fewer, or data.workers=0") from error
    finally:
        if workers:
            reader._iterator._shutdown_workers()  # type: ignore[union-attr]
