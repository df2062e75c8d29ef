"""A cache of decoded images: ``.npy`` arrays on disk, written once and memory-mapped by every rank.

``<cache>/<content hash>/`` holds one dataset: ``{train,test}_{images,labels}.npy`` and ``meta.json``.
``<cache>/index.json`` maps a source's fingerprint to its content hash. All of it may be deleted at any time.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cifar_exp.data.cache_files import read_meta, write_meta
from cifar_exp.data.dataset_files import Arrays, DatasetFiles, array_names
from cifar_exp.data.presence import SPLITS
from cifar_exp.errors import ConfigError, storage_errors
from cifar_exp.system.atomic_files import atomic_folder, remove_unfinished, write_json
from cifar_exp.system.locks import locked

_FORMAT = 3  # version of the files; those of another version are written again
_NAMES = [name for split in SPLITS for name in array_names(split)]


def prepare(
    cache: Path,
    fingerprint: str,
    content_hash: Callable[[], str],
    decode: Callable[[], tuple[tuple[str, ...], Arrays]],
    setting: str,
    too_large: str = "",
) -> DatasetFiles:
    """The dataset's files: looked up by fingerprint, then by content hash, else decoded and written.

    A cache that has the dataset is only read. It may be on read-only storage and needs no lock.

    Args:
        cache: absolute folder of all cached datasets of a source.
        fingerprint: a cheap description of the source; the same fingerprint means the same content.
        content_hash: computes sha256 of the content in hex, which is slow.
        decode: returns class names and arrays.
        setting: the setting that names ``cache``, for messages.
        too_large: a sentence with another remedy if the arrays do not fit on the disk.

    Raises:
        StorageError: the cache cannot be written.
    """
    files = _lookup(cache, fingerprint)
    if files is not None:
        return files
    advice = f"Free space there, or set {setting}=<folder> to a folder that can be written"
    with locked(cache / ".lock", advice):
        remove_unfinished(cache)
        files = _lookup(cache, fingerprint)  # another process may have written it while this one waited
        if files is not None:
            return files
        digest = content_hash()
        files = _open_dataset(cache / digest)
        if files is None:
            classes, arrays = decode()
            with storage_errors(cache, f"{advice}. {too_large}" if too_large else advice):
                files = _write_dataset(cache / digest, classes, arrays)
        with storage_errors(cache, advice):
            write_json(cache / "index.json", {**_read_index(cache), fingerprint: digest})
    return files


def _lookup(cache: Path, fingerprint: str) -> DatasetFiles | None:
    digest = _read_index(cache).get(fingerprint)
    return None if digest is None else _open_dataset(cache / str(digest))


def _read_index(cache: Path) -> dict[str, str]:
    """Content hash by fingerprint; empty if the index is missing or unreadable."""
    try:
        index = json.loads((cache / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def _open_dataset(folder: Path) -> DatasetFiles | None:
    """The dataset in ``folder``; None if it is missing, incomplete or altered."""
    meta = read_meta(folder, _FORMAT, _NAMES)
    if meta is None:
        return None
    try:
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
    except (KeyError, TypeError, IndexError):
        return None


def _write_dataset(folder: Path, classes: tuple[str, ...], arrays: Arrays) -> DatasetFiles:
    with atomic_folder(folder) as unfinished:
        for split in SPLITS:
            images, labels = arrays[split]
            pair: tuple[NDArray[Any], ...] = (np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels)
            for name, array in zip(array_names(split), pair, strict=True):
                np.save(unfinished / name, array, allow_pickle=False)
        train_images = arrays["train"][0]
        counts = np.zeros((3, 256), dtype=np.int64)
        for start in range(0, len(train_images), 1024):  # in chunks, since bincount copies its input to int64
            counts += value_counts(train_images[start : start + 1024])
        mean, std = channel_statistics(counts)
        fields = {
            "classes": classes,
            "train_count": len(train_images),
            "test_count": len(arrays["test"][0]),
            "image_size": list(train_images.shape[2:]),
            "mean": mean,
            "std": std,
            "content_hash": folder.name,
        }
        write_meta(unfinished, _FORMAT, _NAMES, fields)
    files = _open_dataset(folder)
    if files is None:
        raise OSError(f"{folder} was damaged after it was written")
    return files


def value_counts(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Histogram of each channel: (N, 3, H, W) uint8 -> (3, 256) counts."""
    return np.stack([np.bincount(images[:, channel].ravel(), minlength=256) for channel in range(3)])


def channel_statistics(counts: NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all pixels, 0 to 255. ``counts``: from :func:`value_counts`."""
    pixels, values = counts.sum(axis=1), np.arange(256)
    mean = counts @ values / pixels
    variance = (counts * (values - mean[:, None]) ** 2).sum(axis=1) / pixels
    return mean.tolist(), np.sqrt(variance).tolist()


Decoded = Literal["auto", "device", "host"]  # where decoded images lie while a rank trains


def check_decoded(residency: str) -> None:
    """Raise a ConfigError for a residency that decoded images cannot have."""
    if residency not in get_args(Decoded):
        raise ConfigError(
            f"data.residency={residency}: it must be auto, device or host; only data=folders can read image files "
            f"during training. Set data.residency=auto"
        )


def expanded(path: str | Path) -> Path:
    """The path with its ``~`` expanded, which no shell does in a YAML file."""
    return Path(path).expanduser()


def dataset_cache(root: Path, cache: str | Path | None) -> Path:
    """The absolute folder of the cache: ``<root>/.cache`` unless another one is set."""
    return (root / ".cache" if cache is None else expanded(cache)).absolute()
