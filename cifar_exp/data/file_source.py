"""Images read from files or shards while training, for datasets larger than memory."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from cifar_exp.data.image_files import Images, LoaderFiles, checked_image
from cifar_exp.errors import MachineError
from cifar_exp.system.accelerator import supports_async_copies
from cifar_exp.system.host import end_with_parent, worker_start_method
from cifar_exp.system.signals import leave_signals_to_parent

MAX_AUTO_WORKERS = 8  # a rank, with data.workers=auto


class _BothSplits(Dataset[Tensor | str]):
    """The images of both splits by index: training images first."""

    def __init__(self, train: Images, test: Images) -> None:
        self._train, self._test = train, test

    def __getitem__(self, place: int) -> Tensor | str:
        return self._train[place] if place < len(self._train) else self._test[place - len(self._train)]


class _Requests(Sampler[list[int]]):
    """The batches to read next. They are set before each pass, so that the same workers serve all passes."""

    def __init__(self) -> None:
        self.places: Iterable[list[int]] = ()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.places)


SentBatch = Tensor | NDArray[np.uint8] | str  # as a worker sends them


def _collate(images: list[Tensor | str]) -> SentBatch:
    """One batch (B, H, W, 3), or the first problem as text: an exception in a worker would arrive as a traceback."""
    sound = [image for image in images if isinstance(image, Tensor)]
    if len(sound) < len(images):
        return next(image for image in images if isinstance(image, str))
    return _sendable(torch.stack(sound).permute(0, 2, 3, 1).contiguous())


def _sendable(batch: Tensor) -> SentBatch:
    """A worker's batch in shared memory. If that is full or missing: a NumPy array, which is sent through a pipe.

    Containers often have 64 MB of shared memory. Without this, a background thread of torch would move the tensor
    there. If that failed, no error would be raised, and the rank would wait for the batch forever.
    """
    if get_worker_info() is None:  # this is the rank itself
        return batch
    try:
        shared: Tensor = batch.share_memory_()
        return shared
    except (RuntimeError, OSError):  # torch has no class for it
        return batch.numpy()


def _received(images: SentBatch) -> Tensor:
    return torch.from_numpy(images) if isinstance(images, np.ndarray) else checked_image(images)


def _begin_worker(_number: int) -> None:
    """Leave signals to the parent. Otherwise torch's handler would end this worker at any SIGTERM."""
    leave_signals_to_parent()
    end_with_parent()


def _end_workers(iterator: Any) -> None:
    """Ask the workers to end, and kill those that do not: they ignore SIGTERM, and Python would wait for them."""
    iterator._shutdown_workers()
    for worker in iterator._workers:
        if worker.is_alive():
            worker.kill()


@dataclass(frozen=True)
class FileSource:
    """The images of one split, read by worker processes in the order of training.

    Attributes:
        reader: the worker processes.
        first: index of the split's first image in the reader.
        labels: (N,) int64, on the host.
        image_size: height and width in pixels.
        device: the training device.
    """

    reader: "DataLoader[SentBatch]"
    first: int
    labels: Tensor
    image_size: tuple[int, int]
    device: torch.device

    def __len__(self) -> int:
        return len(self.labels)

    def draws(self, order: Tensor, parts: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        labels = self.labels[order].to(self.device)
        requests, meanwhile = self.reader.batch_sampler, supports_async_copies(self.device)
        assert isinstance(requests, _Requests)
        requests.places = ((order[part] + self.first).tolist() for part in parts)
        for part, images in zip(parts, self.reader, strict=True):
            yield _received(images).to(self.device, non_blocking=meanwhile).permute(0, 3, 1, 2), labels[part]

    def pick(self, draw: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        images, labels = draw
        return images, labels


@contextmanager
def opened_files(files: LoaderFiles, device: torch.device, threads: int) -> Iterator[tuple[FileSource, FileSource]]:
    """Training and test images, read by shared worker processes. Workers end with the block or with this process.

    Raises:
        MachineError: a worker process cannot be started or has died, for example because memory is short.
        StorageError: the list of files is missing or unreadable.
    """
    import torchvision.transforms.v2.functional  # noqa: F401 - before the workers are forked, so that they need not

    train, test = files.images("train"), files.images("test")
    workers = min(MAX_AUTO_WORKERS, threads) if files.workers == "auto" else files.workers
    reader = DataLoader(
        _BothSplits(train, test),
        batch_sampler=_Requests(),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=supports_async_copies(device),
        worker_init_fn=_begin_worker if workers else None,
        persistent_workers=workers > 0,
        # A fork server would import torch again for each rank. Forking is safe here: workers start before the rank has
        # Python threads, and they compute with one thread.
        multiprocessing_context=worker_start_method() if workers else None,
        generator=torch.Generator(),  # its seeds are not used, and the network's random numbers must not change
    )
    try:
        iter(reader)  # starts the workers
    except OSError as error:
        raise MachineError(
            f"data.workers={files.workers}: worker processes cannot be started: {error.strerror}. Set "
            f"data.workers=<fewer>, or data.workers=0"
        ) from error
    share = (files.image_size, device)
    try:
        yield (
            FileSource(reader, 0, files.labels("train"), *share),
            FileSource(reader, len(train), files.labels("test"), *share),
        )
    except RuntimeError as error:  # torch has no class for a dead worker
        if not str(error).startswith("DataLoader worker"):
            raise
        what = str(error).rstrip(". ")
        raise MachineError(
            f"data.workers={files.workers}: {what}. Set data.workers=<fewer>, or data.workers=0"
        ) from error
    finally:
        if workers:
            _end_workers(reader._iterator)
