"""Image files: how one is read, and a dataset of files that are read while training.

Such a dataset suits sets larger than memory and images of several sizes. The cache holds the list of files, the labels,
and the channel statistics of a sample.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cifar_exp.data.array_cache import channel_statistics, value_counts
from cifar_exp.data.dataset_files import SPLITS, DatasetFiles, Split, SplitName
from cifar_exp.data.keyed_rng import keyed_generator
from cifar_exp.errors import DataError, storage_errors
from cifar_exp.system.atomic_files import atomic_folder, remove_unfinished
from cifar_exp.system.locks import locked
from cifar_exp.system.progress_line import Progress

SAMPLE = 5000  # images for the channel statistics
_FORMAT = 1  # version of the files; those of another version are written again
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_DECODERS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # not EPS and the like, which start other programs
_MAX_PIXELS = 4096 * 4096  # a small file can claim gigabytes of pixels
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # convert("RGB") would clip them to white


def decode_image(path: Path) -> NDArray[np.uint8] | str:
    """The image (3, H, W) uint8, or what is wrong with the file."""
    try:
        with Image.open(path, formats=_DECODERS) as image:  # reads the header alone
            if image.width * image.height > _MAX_PIXELS:
                return f"claims {image.width} x {image.height} pixels, more than {_MAX_PIXELS:,} in all"
            if image.mode in _DEEP_MODES:
                return f"has more than 8 bits a channel (mode {image.mode})"
            # A palette may have transparency; Pillow warns if it is converted to RGB directly.
            opaque = image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")
            return np.ascontiguousarray(np.asarray(opaque).transpose(2, 0, 1))
    except (ImportError, NameError):  # no file raises these
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        if path.exists() and path.stat().st_size == 0:
            return "is empty"
        return "is no image of a known format" if isinstance(error, UnidentifiedImageError) else str(error)


def read_image(path: Path, size: tuple[int, int]) -> Tensor | str:
    """The image (3, *size) uint8, or what is wrong with the file, its path first.

    Training from files, evaluation and prediction all read images by this function. The image is resized with
    antialiasing until it just covers ``size`` (height, width), then the centre is cropped. An image of that size stays
    unchanged.
    """
    from torchvision.transforms.v2 import functional  # imported here: it takes 1.5 s, and only this needs it

    decoded = decode_image(path)
    if isinstance(decoded, str):
        return f"{path}: {decoded}"
    (height, width), (own_height, own_width) = size, decoded.shape[1:]
    if height * own_width >= width * own_height:  # wider than the target
        covering = [height, int(height * own_width / own_height)]
    else:
        covering = [int(width * own_height / own_width), width]
    resized = functional.resize(torch.from_numpy(decoded), covering, antialias=True)
    cropped: Tensor = functional.center_crop(resized, list(size))
    return cropped


@dataclass(frozen=True, kw_only=True)
class ImageFiles(DatasetFiles):
    """A dataset whose images are read from files. ``folder`` holds the list of files; statistics are those of a sample.

    Attributes:
        root: folder that the listed paths start from, absolute.
        workers: processes a rank that read images. 0 reads them in the rank itself; ``auto`` is the rank's number of
            threads, at most 8.
    """

    root: Path
    workers: int | Literal["auto"] = "auto"

    def load(self, split: SplitName) -> Split:
        """One split decoded into memory, for sets that fit.

        Raises:
            DataError: an image cannot be read.
            StorageError: the list is missing or unreadable.
        """
        paths, labels = self.listed(split)
        images = torch.stack(
            [checked_image(read_image(self.root / os.fsdecode(path), self.image_size)) for path in paths]
        )
        return Split(images.contiguous(memory_format=torch.channels_last), labels)

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
    """A tree of class folders as known without opening its files.

    Attributes:
        root: absolute folder.
        classes: names by label.
        paths: relative to ``root``, the training images first.
        labels: one for each path.
        train_count: training images.
        digest: hash of the listing and of the files' sizes and times, in hex.
    """

    root: Path
    classes: tuple[str, ...]
    paths: Sequence[str]
    labels: Sequence[int]
    train_count: int
    digest: str


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
                statistics = _sample_statistics(listing, (image_size, image_size))
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
        root=listing.root,
        workers=workers,
    )


def _read_statistics(folder: Path) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of the dataset in ``folder``; None where it is missing or incomplete."""
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        whole = meta["format"] == _FORMAT and meta["file_bytes"] == _file_bytes(folder)
        return (list(meta["mean"]), list(meta["std"])) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sample_statistics(listing: Listing, size: tuple[int, int]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, 0 to 255, over at most ``SAMPLE`` resized training images."""
    order = torch.randperm(listing.train_count, generator=keyed_generator("statistics", listing.train_count))
    paths = [listing.root / listing.paths[place] for place in order[:SAMPLE].tolist()]

    def histogram(path: Path) -> NDArray[np.int64]:
        return value_counts(checked_image(read_image(path, size)).numpy()[None])

    counts = np.zeros((3, 256), dtype=np.int64)
    with ThreadPoolExecutor() as pool, Progress("Reading a sample of the images", len(paths), "files") as progress:
        for start in range(0, len(paths), 256):
            part = paths[start : start + 256]
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
        meta = {"format": _FORMAT, "file_bytes": _file_bytes(unfinished), "mean": statistics[0], "std": statistics[1]}
        (unfinished / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _list_names(split: SplitName) -> tuple[str, str]:
    return f"{split}_files.npy", f"{split}_labels.npy"


def _file_bytes(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for split in SPLITS for name in _list_names(split)}


def checked_image(image: Tensor | str) -> Tensor:
    """The image; raises a DataError where it is the description of a problem."""
    if isinstance(image, str):
        raise DataError(f"data.residency=loader: {image}. Replace or delete it.")
    return image
