"""Sources of images -> uint8 arrays on disk, decoded once and shared by all ranks.

The parent process calls one of ``cifar10``, ``folders`` and ``synthetic``. Each brings its images into an array cache
and returns a small ``DatasetFiles``, which every rank maps into its memory: the system holds one copy for all of them.
Only ``folders`` can leave images in their files (``residency="loader"``). A dataset of your own is one more such
function and one YAML file.
"""

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from cifar_exp.data.array_cache import _cache_folder, _path, prepare
from cifar_exp.data.dataset_files import SPLITS, Arrays, DatasetFiles, Residency, SplitName
from cifar_exp.data.image_files import IMAGE_SUFFIXES, Listing, decode_image, prepare_files
from cifar_exp.errors import ConfigError, DataError
from cifar_exp.system.progress_line import Progress

_SHOWN = 5  # paths in a message
_UNDECODED = "let images be read and resized while ranks train: data.residency=loader"
_EXPECTED = (
    "Expected: <root>/train/<class>/*.png and <root>/test/<class>/*.png (or .jpg and others), the same classes in both."
)


def folders(
    root: str | Path,
    *,
    cache: str | Path | None = None,
    residency: Residency = "auto",
    image_size: Annotated[int, Ge(1)] | None = None,
    workers: Annotated[int, Ge(0)] | Literal["auto"] = "auto",
) -> DatasetFiles:
    """Images in ``<root>/train/<class>/`` and ``<root>/test/<class>/``; labels by sorted class name.

    Gray, palette and CMYK images become RGB, transparency is dropped. Hidden files and files that are no images are
    ignored. All images must have one size, unless ``residency`` is ``loader``: then they are resized as they are read,
    the shorter side to ``image_size`` and the centre cut out, and nothing is decoded ahead. Mean and deviation are then
    those of a sample of at most 5,000 training images, and the content hash is one over the files' relative paths,
    sizes and times and ``image_size``: cheaper than their content, but another one where a file was only touched.

    Args:
        root: folder that holds ``train`` and ``test``.
        cache: folder for the decoded arrays; ``<root>/.cache`` if None.
        residency: where the images lie while ranks train, as in ``DatasetFiles``.
        image_size: height and width in pixels; None is the images' own.
        workers: of ``loader``: processes a rank that read images; 0 reads them in the rank itself.

    Raises:
        ConfigError: ``loader`` has no ``image_size``, or the images would have to be resized for another residency.
        DataError: folders or images are missing, broken or of several sizes.
        StorageError: the cache cannot be written.
    """
    if residency == "loader" and image_size is None:
        raise ConfigError(
            "data.image_size=null: data.residency=loader resizes images as it reads them and must know to what. Type "
            "data.image_size=<height and width in pixels>"
        )
    root = _path(root)
    tree = _scan(root)
    if residency == "loader":
        assert image_size is not None
        paths, labels = [file.path for file in tree.files], [file.label for file in tree.files]
        digest = _hash_listing(f"loader {image_size}".encode(), tree.files)
        listing = Listing(root.absolute(), tree.classes, paths, labels, tree.train_count, digest)
        return prepare_files(_cache_folder(root, cache), listing, image_size, workers)

    def decode() -> tuple[tuple[str, ...], Arrays]:
        arrays = _decode_images(root, tree)
        if _scan(root) != tree:
            raise DataError(f"data.root={root} changed while its images were read. Start again when it is at rest.")
        return tree.classes, arrays

    files = prepare(
        _cache_folder(root, cache),
        _fingerprint(root, tree.files),
        lambda: _hash_files(root, tree.files),
        decode,
        "data.cache",
        too_large=f"Or {_UNDECODED} data.image_size=<n>",
    )
    if image_size is not None and files.image_size != (image_size, image_size):
        height, width = files.image_size
        raise ConfigError(
            f"data.image_size={image_size}: the images have {width} x {height} pixels, and data.residency={residency} "
            f"resizes none. Type data.image_size=null, or data.residency=loader data.image_size={image_size}"
        )
    return replace(files, residency=residency)


class _ImageFile(NamedTuple):
    path: str  # relative to the root, with /
    label: int
    size: int  # bytes
    mtime_ns: int


class _Tree(NamedTuple):
    classes: tuple[str, ...]  # sorted
    files: list[_ImageFile]  # the training images, then the test images, each sorted by class and name
    train_count: int


def _scan(root: Path) -> _Tree:
    """What a tree of class folders holds.

    Raises:
        DataError: a folder or a class is missing, or a class has no images.
    """
    for folder in (root, *(root / split for split in SPLITS)):
        if not folder.is_dir():
            raise DataError(
                f"data.root={root}: there is no folder {folder} (looked for {folder.absolute()}).\n{_EXPECTED}\n"
                "Name the folder with data.root=<folder>, let cifar-exp-data make it from the CIFAR-10 archive, "
                "or type experiment=quickstart, which needs no images."
            )
    try:
        names = {split: _visible_folders(root / split) for split in SPLITS}
        _check_classes(root, names)
        classes = tuple(names["train"])
        train, test = (
            [file for label, name in enumerate(classes) for file in _list_class(root, f"{split}/{name}", label)]
            for split in SPLITS
        )
    except OSError as error:
        raise DataError(f"data.root={root}: {error.filename} cannot be read: {error.strerror}") from error
    return _Tree(classes, train + test, len(train))


def _visible_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _check_classes(root: Path, names: dict[SplitName, list[str]]) -> None:
    if not names["train"] and not names["test"]:
        raise DataError(f"data.root={root}: there are no class folders in {root / 'train'}.\n{_EXPECTED}")
    for split, other in (SPLITS, SPLITS[::-1]):
        missing = [f"{split}/{name}" for name in names[other] if name not in names[split]]
        if missing:
            raise DataError(
                f"data.root={root}: {split} and {other} must have the same classes. Missing:\n{_shown(missing)}\n"
                f"Add the folders with their images, or remove the classes from {other}."
            )


def _list_class(root: Path, folder: str, label: int) -> list[_ImageFile]:
    with os.scandir(root / folder) as entries:
        images = [
            entry for entry in entries if not entry.name.startswith(".") and entry.name.lower().endswith(IMAGE_SUFFIXES)
        ]
        stats = [(entry.name, entry.stat()) for entry in images if entry.is_file()]
    if not stats:
        raise DataError(
            f"data.root={root}: the class folder {root / folder} has no images ({', '.join(IMAGE_SUFFIXES)}).\n"
            "Add some, or remove the class from both train and test."
        )
    return sorted(_ImageFile(f"{folder}/{name}", label, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _shown(lines: list[str]) -> str:
    more = f"\n  and {len(lines) - _SHOWN:,} more" if len(lines) > _SHOWN else ""
    return "\n".join(f"  {line}" for line in lines[:_SHOWN]) + more


def _fingerprint(root: Path, files: list[_ImageFile]) -> str:
    """What can be known of a tree without reading it: where it lies, and each file's path, size and time."""
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
                raise DataError(f"data.root={root}: {root / file.path} cannot be read: {error.strerror}") from error
            digest.update(os.fsencode(f"{file.path}\0{len(content)}\0"))
            digest.update(content)
            progress.add(1)
    return digest.hexdigest()


def _decode_images(root: Path, tree: _Tree) -> Arrays:
    """All images of both splits.

    Raises:
        DataError: images are broken, or not all of one size.
    """
    paths = [root / file.path for file in tree.files]
    chunks = [paths[start : start + 256] for start in range(0, len(paths), 256)]
    decoded: list[NDArray[np.uint8] | str] = []
    with ThreadPoolExecutor() as pool, Progress("Reading images", len(paths), "files") as progress:
        for part in pool.map(lambda chunk: [decode_image(path) for path in chunk], chunks):
            decoded += part
            progress.add(len(part))
    images = _stack(root, dict(zip(paths, decoded, strict=True)))
    labels = np.array([file.label for file in tree.files], dtype=np.int64)
    count = tree.train_count
    return {"train": (images[:count], labels[:count]), "test": (images[count:], labels[count:])}


def _stack(root: Path, decoded: dict[Path, NDArray[np.uint8] | str]) -> NDArray[np.uint8]:
    """The images by path as one array (N, 3, H, W), unless one is broken or of another size than most."""
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
            f"{len(odd):,} of {len(sizes):,}:\n{_shown(odd)}\nResize or delete them, or {_UNDECODED} "
            f"data.image_size={side}"
        )
    return np.stack(list(images.values()))
