"""Decoded images on disk: ``.npy`` arrays, keyed by content, written once and mapped into memory by every rank.

``<cache>/<content hash>/`` holds a dataset, ``{train,test}_{images,labels}.npy`` and ``meta.json``;
``<cache>/index.json`` says which content hash a source had when it last looked like this. All of it may be deleted at
any time.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from cifar_exp.errors import StorageError, storage_errors

SplitName = Literal["train", "test"]
SPLITS: tuple[SplitName, SplitName] = ("train", "test")

Arrays = dict[SplitName, tuple[NDArray[np.uint8], NDArray[np.int64]]]
"""Split -> images (N, 3, H, W) uint8, labels (N,) int64."""

Residency = Literal["auto", "device", "host", "loader"]
"""Where training images lie: on the training device, in host memory, or in their files; see ``residency.py``."""

_FORMAT = 2  # of the files; another number means that they are made anew
_UNFINISHED = "unfinished-"


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


def prepare(
    cache: Path,
    fingerprint: str,
    content_hash: Callable[[], str],
    decode: Callable[[], tuple[tuple[str, ...], Arrays]],
    setting: str,
    too_large: str = "",
) -> DatasetFiles:
    """The dataset's files: found by the fingerprint, else by the content hash, else decoded and written.

    A cache that has them is only read, so that it may lie on read-only storage and need no lock.

    Args:
        cache: absolute folder of all cached datasets of a source.
        fingerprint: what is cheap to know about the source; the same fingerprint means the same content.
        content_hash: the dear way to know: sha256 of the content, in hex.
        decode: class names and arrays.
        setting: the setting that names ``cache``.
        too_large: what to do where the arrays do not fit there, other than to make room; one sentence.

    Raises:
        StorageError: the cache cannot be written.
    """
    files = _lookup(cache, fingerprint)
    if files is not None:
        return files
    advice = f"Make room, or choose a folder that can be written: {setting}=<folder>"
    with locked(cache / ".lock", advice):
        remove_leftovers(cache)
        files = _lookup(cache, fingerprint)  # another process may have finished it while this one waited
        if files is not None:
            return files
        digest = content_hash()
        files = _open_dataset(cache / digest)
        if files is None:
            classes, arrays = decode()
            with storage_errors(cache, f"{advice}. {too_large}" if too_large else advice):
                files = _write_dataset(cache / digest, classes, arrays)
        with storage_errors(cache, advice):
            _write_index(cache, {**_read_index(cache), fingerprint: digest})
    return files


@contextmanager
def locked(file: Path, advice: str) -> Iterator[None]:
    """Hold a lock file against other processes and threads; its folder is made if missing.

    Raises:
        StorageError: the folder cannot be written; the message ends with ``advice``.
    """
    with storage_errors(file.parent, advice):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file).acquire()
    with lock:
        yield


def _lookup(cache: Path, fingerprint: str) -> DatasetFiles | None:
    digest = _read_index(cache).get(fingerprint)
    return None if digest is None else _open_dataset(cache / str(digest))


def _read_index(cache: Path) -> dict[str, str]:
    """Content hash by fingerprint; empty where there is no readable index."""
    try:
        index = json.loads((cache / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _write_index(cache: Path, index: dict[str, str]) -> None:
    temporary = cache / "index.json.tmp"
    temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")
    temporary.replace(cache / "index.json")


def _open_dataset(folder: Path) -> DatasetFiles | None:
    """The dataset in ``folder``; None unless it is whole."""
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != _FORMAT or meta["file_bytes"] != _file_bytes(folder):
            return None
        return DatasetFiles(
            folder=folder,
            classes=tuple(meta["classes"]),
            train_count=meta["train_count"],
            test_count=meta["test_count"],
            image_size=(meta["image_size"][0], meta["image_size"][1]),
            mean=(meta["mean"][0], meta["mean"][1], meta["mean"][2]),
            std=(meta["std"][0], meta["std"][1], meta["std"][2]),
            content_hash=meta["content_hash"],
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _write_dataset(folder: Path, classes: tuple[str, ...], arrays: Arrays) -> DatasetFiles:
    with new_folder(folder) as unfinished:
        for split in SPLITS:
            images, labels = arrays[split]
            pair: tuple[NDArray[Any], ...] = (np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels)
            for name, array in zip(_array_names(split), pair, strict=True):
                with durable(unfinished / name) as file:
                    np.save(file, array, allow_pickle=False)
        train_images = arrays["train"][0]
        counts = np.zeros((3, 256), dtype=np.int64)
        for start in range(0, len(train_images), 1024):  # bincount makes an int64 copy of what it counts
            counts += value_counts(train_images[start : start + 1024])
        mean, std = channel_statistics(counts)
        meta = {
            "format": _FORMAT,
            "file_bytes": _file_bytes(unfinished),
            "classes": classes,
            "train_count": len(train_images),
            "test_count": len(arrays["test"][0]),
            "image_size": train_images.shape[2:],
            "mean": mean,
            "std": std,
            "content_hash": folder.name,
        }
        with durable(unfinished / "meta.json") as file:
            file.write(json.dumps(meta, indent=1).encode())
    files = _open_dataset(folder)
    if files is None:
        raise OSError(f"{folder} is not as it was written")
    return files


def remove_leftovers(cache: Path) -> None:
    """Remove what a dead process left of :func:`new_folder`; to be called by who holds the lock, as a live one does."""
    for leftover in cache.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, renamed to ``folder`` when the block ends: that is whole whenever it is there at all."""
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder.parent))
    try:
        unfinished.chmod(0o755)  # mkdtemp's 0700 would keep a shared cache from everyone else
        yield unfinished
        shutil.rmtree(folder, ignore_errors=True)  # one that was not whole
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def durable(path: Path) -> Iterator[BinaryIO]:
    """A new file, on disk when the block ends: else a crash might keep the folder's new name and lose the content."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _array_names(split: SplitName) -> tuple[str, str]:
    return f"{split}_images.npy", f"{split}_labels.npy"


def _file_bytes(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for split in SPLITS for name in _array_names(split)}


def value_counts(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each channel has each value: (N, 3, H, W) -> (3, 256)."""
    return np.stack([np.bincount(images[:, channel].ravel(), minlength=256) for channel in range(3)])


def channel_statistics(counts: NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all pixels, 0 to 255; exact, from ``value_counts``."""
    pixels, values = counts.sum(axis=1), np.arange(256)
    mean = counts @ values / pixels
    variance = (counts * (values - mean[:, None]) ** 2).sum(axis=1) / pixels
    return mean.tolist(), np.sqrt(variance).tolist()
