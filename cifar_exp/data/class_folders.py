"""A tree of class folders as a dataset, decoded into the array cache or read from its files while training.

The parent process calls one dataset function: ``folders``, ``cifar10`` or ``synthetic``. It returns a small
``DatasetFiles``. All ranks memory-map the same arrays. To add a dataset, write such a function and a YAML file.
"""

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from cifar_exp.data.array_cache import dataset_cache, expanded, prepare
from cifar_exp.data.dataset_files import Arrays, DatasetFiles, Residency
from cifar_exp.data.image_files import Listing, prepare_files
from cifar_exp.data.image_reader import Preprocessing, decode_image, read_image
from cifar_exp.data.image_tree import HIDDEN, IMAGE_SUFFIXES, STRAY, SkippedFiles, images_below, is_image_name
from cifar_exp.data.presence import EXPECTED, SPLITS, SplitName, check_tree
from cifar_exp.errors import ConfigError, DataError
from cifar_exp.system.printable import printable
from cifar_exp.system.progress_line import Progress

_MAX_PATHS_SHOWN = 5  # in a message
_USE_LOADER = "read and resize images while training: set data.residency=loader"


def folders(
    root: str | Path,
    *,
    cache: str | Path | None,
    residency: Residency,
    image_size: Annotated[int, Ge(1)] | None,
    workers: Annotated[int, Ge(0)] | Literal["auto"],
) -> DatasetFiles:
    """Images in ``<root>/train/<class>/`` and ``<root>/test/<class>/``; labels by sorted class name.

    Images in sub-folders of a class belong to it. Hidden files and files that are not images are skipped and counted.
    ``image_reader.py`` describes how a file is decoded. With ``image_size`` all images are resized and cropped to it,
    for every residency; without it they must have the same size.

    ``loader`` reads images while training. Mean and standard deviation come from a sample of at most 5,000 training
    images. The content hash covers ``image_size`` and the paths, sizes and times of the files, so touching a file
    changes it.

    Args:
        root: folder that holds ``train`` and ``test``.
        cache: folder for the decoded arrays; ``<root>/.cache`` if None.
        residency: where the images lie while ranks train, as in ``DatasetFiles``.
        image_size: height and width in pixels that images are resized to; None keeps their own size.
        workers: for ``loader``: processes a rank that read images; 0 reads them in the rank itself.

    Raises:
        ConfigError: ``loader`` has no ``image_size``.
        DataError: folders or images are missing, broken or of several sizes.
        StorageError: the cache cannot be written.
    """
    if residency == "loader" and image_size is None:
        raise ConfigError(
            "data.image_size=null: data.residency=loader resizes images as it reads them and needs a size. Set "
            "data.image_size=<height and width in pixels>"
        )
    root = expanded(root)
    tree = _scan(root)
    if residency == "loader":
        assert image_size is not None
        return prepare_files(dataset_cache(root, cache), _listing(root, tree, image_size), image_size, workers)

    files = _decoded_files(root, tree, dataset_cache(root, cache), image_size)
    return replace(files, residency=residency, skipped=tree.skipped)


def _decoded_files(root: Path, tree: "_Tree", cache: Path, image_size: int | None) -> DatasetFiles:
    """The tree's images in the array cache."""

    def decode() -> tuple[tuple[str, ...], Arrays]:
        arrays = _decode_images(root, tree, image_size)
        if _scan(root) != tree:
            raise DataError(
                f"data.root={root} changed while its images were read. Start again when it no longer changes."
            )
        return tree.classes, arrays

    resized = "" if image_size is None else f" {image_size}"

    def content_hash() -> str:
        content = _hash_files(root, tree.files)
        return hashlib.sha256(f"{content}{resized}".encode()).hexdigest() if resized else content

    return prepare(
        cache,
        f"{_fingerprint(root, tree.files)}{resized}",
        content_hash,
        decode,
        "data.cache",
        too_large=f"Or {_USE_LOADER} data.image_size=<n>",
    )


def _listing(root: Path, tree: "_Tree", image_size: int) -> Listing:
    paths, labels = [file.path for file in tree.files], [file.label for file in tree.files]
    digest = _hash_listing(f"loader {image_size}".encode(), tree.files)
    return Listing(root.absolute(), tree.classes, paths, labels, tree.train_count, digest, tree.skipped)


class _ImageFile(NamedTuple):
    path: str  # relative to the root, with /
    label: int
    size: int  # bytes
    mtime_ns: int


class _Tree(NamedTuple):
    classes: tuple[str, ...]  # sorted
    files: list[_ImageFile]  # the training images, then the test images, each sorted by class and name
    train_count: int
    skipped: str


def _scan(root: Path) -> _Tree:
    """The classes and image files of a tree of class folders.

    Raises:
        DataError: a folder or a class is missing, or a class has no images.
    """
    check_tree(root)
    skipped = SkippedFiles()
    try:
        names = {split: _class_names(root / split, skipped) for split in SPLITS}
        _check_classes(root, names)
        classes = tuple(names["train"])
        train, test = (
            [file for label, name in enumerate(classes) for file in _class_files(root, split, name, label, skipped)]
            for split in SPLITS
        )
    except OSError as error:
        where = printable(os.fsdecode(error.filename))
        raise DataError(f"data.root={root}: {where} cannot be read: {error.strerror}") from error
    return _Tree(classes, train + test, len(train), skipped.line())


def _class_names(folder: Path, skipped: SkippedFiles) -> list[str]:
    names: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                skipped[HIDDEN] += 1
            elif entry.is_dir():
                names.append(entry.name)
            elif is_image_name(entry.name):
                skipped[STRAY] += 1
    return sorted(names)


def _check_classes(root: Path, names: dict[SplitName, list[str]]) -> None:
    if not names["train"] and not names["test"]:
        raise DataError(
            f"data.root={root}: there are no class folders in {root / 'train'}.\n{EXPECTED}\nSet data.root=<folder>"
        )
    for split, other in (SPLITS, SPLITS[::-1]):
        missing = [f"{split}/{name}" for name in names[other] if name not in names[split]]
        if missing:
            raise DataError(
                f"data.root={root}: {split} and {other} must have the same classes. Missing:\n{_shown(missing)}\n"
                f"Add the folders with their images, or remove the classes from {other}."
            )


def _class_files(root: Path, split: SplitName, name: str, label: int, skipped: SkippedFiles) -> list[_ImageFile]:
    folder = f"{split}/{name}"
    images = images_below(root / folder, skipped)
    if not images:
        raise DataError(
            f"data.root={root}: the class folder {printable(root / folder)} has no images "
            f"({', '.join(IMAGE_SUFFIXES)}).\nAdd some, or remove the class from both train and test."
        )
    return [_ImageFile(f"{folder}/{path}", label, size, mtime_ns) for path, size, mtime_ns in images]


def _shown(lines: list[str]) -> str:
    more = f"\n  and {len(lines) - _MAX_PATHS_SHOWN:,} more" if len(lines) > _MAX_PATHS_SHOWN else ""
    return "\n".join(f"  {printable(line)}" for line in lines[:_MAX_PATHS_SHOWN]) + more


def _fingerprint(root: Path, files: list[_ImageFile]) -> str:
    """The location of a tree, and path, size and time of its files; no file is read."""
    return f"folders {_hash_listing(os.fsencode(root.absolute()), files)}"


def _hash_listing(start: bytes, files: list[_ImageFile]) -> str:
    """Sha256 over ``start`` and each file's path, size and time, in hex."""
    digest = hashlib.sha256(start)
    for file in files:
        digest.update(os.fsencode(f"\n{file.path}\0{file.size}\0{file.mtime_ns}"))
    return digest.hexdigest()


def _hash_files(root: Path, files: list[_ImageFile]) -> str:
    """Sha256 over each file's path and content, in hex.

    Raises:
        DataError: a file cannot be read.
    """
    digest = hashlib.sha256()
    with Progress("Looking for changed images", len(files), "files") as progress:
        for file in files:
            try:
                content = (root / file.path).read_bytes()
            except OSError as error:
                where = printable(root / file.path)
                raise DataError(f"data.root={root}: {where} cannot be read: {error.strerror}") from error
            digest.update(os.fsencode(f"{file.path}\0{len(content)}\0"))
            digest.update(content)
            progress.add(1)
    return digest.hexdigest()


def _decode_images(root: Path, tree: _Tree, image_size: int | None) -> Arrays:
    """All images of both splits.

    Raises:
        DataError: images are broken, or not all of one size.
    """
    read = decode_image if image_size is None else partial(_resized, size=image_size)
    paths = [root / file.path for file in tree.files]
    chunks = [paths[start : start + 256] for start in range(0, len(paths), 256)]
    decoded: list[NDArray[np.uint8] | str] = []
    with ThreadPoolExecutor() as pool, Progress("Reading images", len(paths), "files") as progress:
        for part in pool.map(lambda chunk: [read(path) for path in chunk], chunks):
            decoded += part
            progress.add(len(part))
    images = _stack(root, dict(zip(paths, decoded, strict=True)))
    labels = np.array([file.label for file in tree.files], dtype=np.int64)
    count = tree.train_count
    return {"train": (images[:count], labels[:count]), "test": (images[count:], labels[count:])}


def _resized(path: Path, size: int) -> NDArray[np.uint8] | str:
    image = read_image(path, Preprocessing((size, size)))
    return image.removeprefix(f"{printable(path)}: ") if isinstance(image, str) else image.numpy()


def _stack(root: Path, decoded: dict[Path, NDArray[np.uint8] | str]) -> NDArray[np.uint8]:
    """Stack the images to one array (N, 3, H, W). Refused if an image is broken or differs in size from the others."""
    broken = [f"{path}: {problem}" for path, problem in decoded.items() if isinstance(problem, str)]
    if broken:
        raise DataError(
            f"data.root={root}: {len(broken):,} of {len(decoded):,} images cannot be used:\n{_shown(broken)}\n"
            "Replace or delete them."
        )
    images = {path: image for path, image in decoded.items() if not isinstance(image, str)}
    sizes = {path: f"{image.shape[2]} x {image.shape[1]}" for path, image in images.items()}
    usual, _ = Counter(sizes.values()).most_common(1)[0]
    side = min(map(int, usual.split(" x ")))
    odd = [f"{path}: {size}" for path, size in sizes.items() if size != usual]
    if odd:
        raise DataError(
            f"data.root={root}: all images must have one size. Most have {usual} pixels, but not these "
            f"{len(odd):,} of {len(sizes):,}:\n{_shown(odd)}\nResize or delete them, or set data.image_size={side} "
            f"to resize all; for a set larger than memory {_USE_LOADER} data.image_size={side}"
        )
    return np.stack(list(images.values()))
