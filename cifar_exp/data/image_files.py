"""A dataset of image files that are read while training.

Use it for datasets larger than memory and for images of several sizes. The cache has the list of files, the labels, and
the channel statistics of a sample.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar_exp.data.array_cache import channel_statistics, value_counts
from cifar_exp.data.cache_files import read_meta, write_meta
from cifar_exp.data.dataset_files import DatasetFiles, Split
from cifar_exp.data.image_reader import Preprocessing, read_image
from cifar_exp.data.keyed_rng import keyed_generator
from cifar_exp.data.presence import SPLITS, SplitName
from cifar_exp.errors import DataError, storage_errors
from cifar_exp.system.atomic_files import atomic_folder, remove_unfinished
from cifar_exp.system.locks import locked
from cifar_exp.system.progress_line import Progress

SAMPLE = 5000  # images for the channel statistics
_FORMAT = 2  # version of the files; those of another version are written again


class Images(Protocol):
    """Images that are read one at a time, also by worker processes."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int) -> Tensor | str:
        """The image (3, H, W) uint8, or the message for the user if it cannot be read."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoaderFiles(DatasetFiles, ABC):
    """A dataset whose images are read while training. ``folder`` holds their list; statistics are those of a sample.

    Attributes:
        workers: processes a rank that read images. 0 reads them in the rank itself; ``auto`` is the rank's number of
            threads, at most 8.
    """

    workers: int | Literal["auto"] = "auto"

    @abstractmethod
    def images(self, split: SplitName) -> Images:
        """The images of one split.

        Raises:
            StorageError: their list is missing or unreadable.
        """

    def load(self, split: SplitName) -> Split:
        """One split decoded into memory, for sets that fit.

        Raises:
            DataError: an image cannot be read.
            StorageError: the list is missing or unreadable.
        """
        listed = self.images(split)
        images = torch.stack([checked_image(listed[place]) for place in range(len(listed))])
        return Split(images.contiguous(memory_format=torch.channels_last), self.labels(split))


@dataclass(frozen=True)
class FileImages:
    """Images in files of their own.

    Attributes:
        root: folder that the paths start from, absolute.
        paths: one for each image.
        rule: how they are read.
    """

    root: Path
    paths: Sequence[str] | NDArray[np.bytes_]
    rule: Preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> Tensor | str:
        image = read_image(self.root / os.fsdecode(self.paths[place]), self.rule)
        return f"data.residency=loader: {image}. Replace or delete it." if isinstance(image, str) else image


@dataclass(frozen=True, kw_only=True)
class ImageFiles(LoaderFiles):
    """A tree of class folders whose images are read while training.

    Attributes:
        root: folder that the listed paths start from, absolute.
    """

    root: Path

    def images(self, split: SplitName) -> Images:
        return FileImages(self.root, self.listed(split)[0], self.preprocessing)

    def listed(self, split: SplitName) -> tuple[NDArray[np.bytes_], Tensor]:
        """Paths (N,) relative to ``root``, memory-mapped, and labels (N,) int64.

        Raises:
            StorageError: the list is missing or unreadable.
        """
        paths, labels = map(self._mapped, _list_names(split))
        return paths, torch.from_numpy(labels)

    def labels(self, split: SplitName) -> Tensor:
        return self.listed(split)[1]


@dataclass(frozen=True)
class Listing:
    """The file list of a tree of class folders: paths and labels, without reading images.

    Attributes:
        root: absolute folder.
        classes: names by label.
        paths: relative to ``root``, the training images first.
        labels: one for each path.
        train_count: training images.
        digest: hash of the listing and of the files' sizes and times, in hex.
        skipped: the files of the tree that are not used, in one line.
    """

    root: Path
    classes: tuple[str, ...]
    paths: Sequence[str]
    labels: Sequence[int]
    train_count: int
    digest: str
    skipped: str = ""


def prepare_files(cache: Path, listing: Listing, image_size: int, workers: int | Literal["auto"]) -> ImageFiles:
    """The dataset of a listing; its statistics are computed unless the cache has them.

    Args:
        cache: absolute folder of all cached datasets of a source.
        listing: the files.
        image_size: height and width in pixels after resizing.
        workers: as in :class:`ImageFiles`.

    Raises:
        DataError: an image of the sample cannot be read.
        StorageError: the cache cannot be written.
    """
    folder = cache / listing.digest
    statistics = _read_statistics(folder)
    if statistics is None:
        advice = "Free space there, or set data.cache=<folder> to a folder that can be written"
        with locked(cache / ".lock", advice):
            remove_unfinished(cache)
            statistics = _read_statistics(folder)  # another process may have written it while this one waited
            if statistics is None:
                paths = listing.paths[: listing.train_count]
                rule = Preprocessing((image_size, image_size))
                statistics = sample_statistics(FileImages(listing.root, paths, rule))
                with storage_errors(cache, advice):
                    _write_lists(folder, listing, statistics)
    mean, std = statistics
    return ImageFiles(
        folder=folder,
        classes=listing.classes,
        train_count=listing.train_count,
        test_count=len(listing.paths) - listing.train_count,
        image_size=(image_size, image_size),
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        content_hash=listing.digest,
        residency="loader",
        skipped=listing.skipped,
        root=listing.root,
        workers=workers,
    )


def _read_statistics(folder: Path) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of the dataset in ``folder``; None if it is missing, incomplete or altered."""
    meta = read_meta(folder, _FORMAT, [name for split in SPLITS for name in _list_names(split)])
    return None if meta is None else (list(meta["mean"]), list(meta["std"]))


def sample_statistics(images: Images) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, 0 to 255, over at most ``SAMPLE`` of the training images.

    Raises:
        DataError: one of these images cannot be read.
    """
    order = torch.randperm(len(images), generator=keyed_generator("statistics", len(images)))
    places = order[:SAMPLE].tolist()

    def histogram(place: int) -> NDArray[np.int64]:
        return value_counts(checked_image(images[place]).numpy()[None])

    counts = np.zeros((3, 256), dtype=np.int64)
    with ThreadPoolExecutor() as pool, Progress("Reading a sample of the images", len(places), "images") as progress:
        for start in range(0, len(places), 256):
            part = places[start : start + 256]
            counts += sum(pool.map(histogram, part))
            progress.add(len(part))
    return channel_statistics(counts)


def _write_lists(folder: Path, listing: Listing, statistics: tuple[list[float], list[float]]) -> None:
    parts = {"train": slice(0, listing.train_count), "test": slice(listing.train_count, None)}
    with atomic_folder(folder) as unfinished:
        for split in SPLITS:
            # Fixed-length bytes can be memory-mapped: no rank or worker copies a million names.
            paths = np.array([os.fsencode(path) for path in listing.paths[parts[split]]], dtype=np.bytes_)
            labels = np.array(listing.labels[parts[split]], dtype=np.int64)
            for name, array in zip(_list_names(split), (paths, labels), strict=True):
                np.save(unfinished / name, array, allow_pickle=False)
        names = [name for split in SPLITS for name in _list_names(split)]
        write_meta(unfinished, _FORMAT, names, {"mean": statistics[0], "std": statistics[1]})


def _list_names(split: SplitName) -> tuple[str, str]:
    return f"{split}_files.npy", f"{split}_labels.npy"


def checked_image(image: Tensor | str) -> Tensor:
    """The image; raises a DataError where it is a message."""
    if isinstance(image, str):
        raise DataError(image)
    return image
