"""Shards as a data set: find them, index them once, and list their images.

Training reads a sample of a shard as it reads a file (``file_source.py``): the order is a function of the seed, each
rank and worker reads its own part of it, and a resumed run continues at the same step.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from cifar_exp.data.array_cache import dataset_cache, expanded
from cifar_exp.data.cache_files import read_meta, write_meta
from cifar_exp.data.image_files import sample_statistics
from cifar_exp.data.image_reader import Preprocessing
from cifar_exp.data.image_tree import SkippedFiles
from cifar_exp.data.presence import SPLITS, SplitName, check_shard_folders
from cifar_exp.data.shards.classes import NAMES_FILE, class_names, stated_names
from cifar_exp.data.shards.listing import Format, shards_of
from cifar_exp.data.shards.places import Folder, Place
from cifar_exp.data.shards.s3 import SCHEME, Bucket
from cifar_exp.data.shards.samples import Columns, ShardIndex
from cifar_exp.data.shards.shard_images import LISTED, Shard, ShardFiles, ShardImages, list_names
from cifar_exp.data.shards.store import ShardFile, Store
from cifar_exp.errors import ConfigError, DataError, storage_errors
from cifar_exp.system.atomic_files import atomic_folder, remove_unfinished
from cifar_exp.system.locks import locked

_FORMAT = 1  # version of the list; one of another version is written again
_NAMES = [name for split in SPLITS for name in list_names(split)]


def shards(
    root: str | Path,
    *,
    format: Format,
    image: str,
    label: str,
    endpoint: str | None,
    cache: str | Path | None,
    cache_limit: Annotated[float, Ge(0)],
    image_size: Annotated[int, Ge(1)] | None,
    workers: Annotated[int, Ge(0)] | Literal["auto"],
) -> ShardFiles:
    """Images in the shards below ``<root>/train/`` and ``<root>/test/``, WebDataset or MosaicML streaming (MDS).

    Labels are whole numbers from 0. Class names are the lines of ``<root>/classnames.txt``, else these numbers. The
    first start reads every shard once and keeps the places of its images. The content hash covers ``image_size`` and
    the shards' names, sizes, and times (or ETags).

    Args:
        root: a folder, or ``s3://bucket/prefix``.
        format: of the shards; ``auto``: MDS where ``train/`` has an ``index.json``, else WebDataset.
        image: which part of a sample is the image, see ``Columns``.
        label: which part is the label.
        endpoint: address of the S3 server; None: ``AWS_ENDPOINT_URL``, else Amazon's.
        cache: folder for places, statistics and copies; None: ``<root>/.cache``, and ``data/.cache`` for S3.
        cache_limit: gigabytes of copies of downloaded or decompressed shards.
        image_size: height and width in pixels that images are resized to.
        workers: processes a rank that read images; 0 reads them in the rank itself.

    Raises:
        ConfigError: ``image_size`` is missing, or an address has another form.
        DataError: shards are missing or damaged, or labels are wrong.
        MachineError: a package is missing.
        StorageError: the cache cannot be written.
    """
    if image_size is None:
        raise ConfigError(
            "data.image_size=null: shards are resized as they are read and need a size. Set data.image_size=<height "
            "and width in pixels>"
        )
    place = _place(root, endpoint)
    columns = Columns(image, label)
    found = {split: shards_of(place, split, format, columns) for split in SPLITS}
    folder = dataset_cache(Path("data") if isinstance(place, Bucket) else expanded(root), cache)
    store = Store(place, folder, cache_limit)
    return _prepared(store, found, image_size, workers)


def _place(root: str | Path, endpoint: str | None) -> Place:
    """Where the shards are. Raises as :func:`shards`."""
    if str(root).startswith(SCHEME):
        return Bucket.at(str(root), endpoint)
    if "://" in str(root):
        raise ConfigError(
            "data.root must be a folder or s3://<bucket>/<prefix>; no other address is read. Set data.root=<folder>, "
            "or data.root=s3://<bucket>/<prefix> with data.endpoint=<address> for a server with the interface of S3"
        )
    place = Folder(expanded(root).absolute())
    check_shard_folders(expanded(root))
    return place


def _prepared(
    store: Store, found: Mapping[SplitName, Sequence[ShardFile]], image_size: int, workers: int | Literal["auto"]
) -> ShardFiles:
    """The dataset; what the cache has is only read."""
    every = [shard for split in SPLITS for shard in found[split]]
    names = stated_names(store.place, store.place.find(NAMES_FILE))
    digest = _digest(found, image_size, names)
    folder = store.cache / digest
    meta = read_meta(folder, _FORMAT, _NAMES)
    if meta is None or not store.are_complete(every):
        advice = "Free space there, or set data.cache=<folder> to a folder that can be written"
        with locked(store.cache / ".lock", advice):
            remove_unfinished(store.cache)
            indices = store.prepare(every)
            meta = read_meta(folder, _FORMAT, _NAMES)  # another process may have written it meanwhile
            if meta is None:
                listed = dict(
                    zip(SPLITS, (indices[: len(found["train"])], indices[len(found["train"]) :]), strict=True)
                )
                _write_list(store, found, listed, folder, image_size, names)
                meta = read_meta(folder, _FORMAT, _NAMES)
                assert meta is not None
    mean, std = meta["mean"], meta["std"]
    return ShardFiles(
        folder=folder,
        classes=tuple(meta["classes"]),
        train_count=meta["counts"]["train"],
        test_count=meta["counts"]["test"],
        image_size=(image_size, image_size),
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        content_hash=digest,
        residency="loader",
        skipped=meta["skipped"],
        workers=workers,
        place=store.place,
        shards=_as_read(store, every, meta["pixels"]),
    )


def _digest(found: Mapping[SplitName, Sequence[ShardFile]], image_size: int, names: tuple[str, ...] | None) -> str:
    facts = [[split, shard.identity, shard.columns] for split in SPLITS for shard in found[split]]
    return hashlib.sha256(json.dumps(["shards", image_size, names, facts]).encode()).hexdigest()


def _as_read(store: Store, every: Sequence[ShardFile], pixels: Sequence[bool]) -> tuple[Shard, ...]:
    return tuple(
        Shard(shard.stored, shard.raw_bytes, bool(shard.compression), is_pixels, copy)
        for shard, is_pixels, copy in zip(every, pixels, store.copies(every), strict=True)
    )


def _write_list(
    store: Store,
    found: Mapping[SplitName, Sequence[ShardFile]],
    indices: Mapping[SplitName, Sequence[ShardIndex]],
    folder: Path,
    image_size: int,
    stated: tuple[str, ...] | None,
) -> None:
    """Write the places and labels of all images, and the classes and statistics.

    Raises:
        DataError: a split has no images, labels are wrong, or an image of the sample cannot be read.
    """
    skipped = SkippedFiles()
    for split in SPLITS:
        for index in indices[split]:
            skipped.update(index.skipped)
    line = skipped.line()
    for split in SPLITS:
        if not sum(len(index.places) for index in indices[split]):
            raise DataError(
                f"data.root={store.place.address}: the shards in {split}/ have no image with a label"
                f"{f' ({line})' if line else ''}. A sample is an image (key.jpg) and a label (key.cls, or a field of "
                f"key.json). Set data.image=<suffix or column> and data.label=<cls, field or column>"
            )
    named = {
        split: [(shard.stored.name, index) for shard, index in zip(found[split], indices[split], strict=True)]
        for split in SPLITS
    }
    classes = class_names(store.place, named, stated)
    listed = _listed(indices)
    every = [index for split in SPLITS for index in indices[split]]
    pixels = [index.is_pixels for index in every]
    shards = _as_read(store, [shard for split in SPLITS for shard in found[split]], pixels)
    mean, std = sample_statistics(
        ShardImages(store.place, shards, listed["train"][0], Preprocessing((image_size, image_size)))
    )
    advice = "Free space there, or set data.cache=<folder> to a folder that can be written"
    with storage_errors(folder, advice), atomic_folder(folder) as unfinished:
        for split in SPLITS:
            for name, array in zip(list_names(split), listed[split], strict=True):
                np.save(unfinished / name, array, allow_pickle=False)
        counts = {split: len(listed[split][0]) for split in SPLITS}
        fields = {"classes": classes, "counts": counts, "skipped": line, "pixels": pixels, "mean": mean, "std": std}
        write_meta(unfinished, _FORMAT, _NAMES, fields)


def _listed(
    indices: Mapping[SplitName, Sequence[ShardIndex]],
) -> dict[SplitName, tuple[NDArray[np.void], NDArray[np.int64]]]:
    """Places and labels of all images of each split, in the order of the shards."""
    first, listed = 0, {}
    for split in SPLITS:
        count = sum(len(index.places) for index in indices[split])
        places, labels, start = np.empty(count, LISTED), np.empty(count, np.int64), 0
        for number, index in enumerate(indices[split], first):
            part = slice(start, start + len(index.places))
            places["shard"][part] = number
            places["offset"][part], places["size"][part] = index.places["offset"], index.places["size"]
            labels[part], start = index.places["label"], part.stop
        listed[split] = (places, labels)
        first += len(indices[split])
    return listed
