"""Sources of images -> uint8 arrays on disk, decoded once and shared by all ranks.

The parent process calls one of ``cifar10``, ``folders`` and ``synthetic``. Each brings its images into a cache of
plain ``.npy`` files, keyed by content, and returns a small ``DatasetFiles``, which every rank maps into its memory: the
system holds one copy for all of them. A dataset of your own is one more such function and one YAML file.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as cached
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cifar_exp import download
from cifar_exp.download import Arrays, Progress, storage_errors
from cifar_exp.errors import ConfigError, DataError, StorageError

_SPLITS = ("train", "test")


@dataclass(frozen=True)
class Split:
    """Images of one split.

    Attributes:
        images: (N, 3, H, W) uint8.
        labels: (N,) int64, each an index into the dataset's classes.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class DatasetFiles:
    """A decoded dataset on disk; small and picklable.

    Attributes:
        folder: where the arrays lie, absolute.
        classes: names by label, sorted.
        train_count: training images.
        test_count: test images.
        image_size: height and width in pixels.
        mean: of the training set's channels, 0 to 255.
        std: of the training set's channels, 0 to 255, over all pixels (population).
        content_hash: sha256 in hex of what the arrays were made from.
    """

    folder: Path
    classes: tuple[str, ...]
    train_count: int
    test_count: int
    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    content_hash: str

    def load(self, split: Literal["train", "test"]) -> Split:
        """One split, mapped and not copied: processes that load it share the page cache.

        Raises:
            StorageError: the cache is gone or cannot be read.
        """
        try:
            # Copy-on-write: torch accepts the arrays as writable, and nobody can change the file.
            images, labels = (np.load(self.folder / name, mmap_mode="c") for name in _array_names(split))
        except (OSError, ValueError) as error:
            raise StorageError(f"{self.folder} cannot be read: {error}. Start again, and it is made anew.") from error
        return Split(torch.from_numpy(images), torch.from_numpy(labels))


def cifar10(
    root: str | Path,
    *,
    mirror: str | None = None,
    archive: str | Path | None = None,
    cache: str | Path | None = None,
    size: int = download.SIZE,
    sha256: str = download.SHA256,
) -> DatasetFiles:
    """CIFAR-10 as released: 50,000 training and 10,000 test images of 32 x 32 pixels in 10 classes, lossless.

    Once decoded, neither the network nor the archive is needed. Source: Krizhevsky, Learning Multiple Layers of
    Features from Tiny Images, 2009.

    Args:
        root: folder that the archive is downloaded to.
        mirror: address to download from instead of the release's own.
        archive: a local copy of the archive; nothing is downloaded then.
        cache: folder for the decoded arrays; ``<root>/.cache`` if None.
        size: of the archive in bytes.
        sha256: of the archive, in hex.

    Raises:
        ConfigError: the mirror is no http or https address.
        DataError: the archive cannot be had or is not the right one.
        StorageError: ``root`` or the cache cannot be written.
    """
    root = _path(root)

    def decode() -> tuple[tuple[str, ...], Arrays]:
        return download.read_archive(download.fetch(root, mirror=mirror, archive=archive, size=size, sha256=sha256))

    return _prepare(_cache_folder(root, cache), f"archive {sha256}", lambda: sha256, decode, "data.cache")


def folders(root: str | Path, *, cache: str | Path | None = None) -> DatasetFiles:
    """Images in ``<root>/train/<class>/`` and ``<root>/test/<class>/``, all of one size; labels by sorted class name.

    Gray, palette and CMYK images become RGB, transparency is dropped. Hidden files and files that are no images are
    ignored.

    Args:
        root: folder that holds ``train`` and ``test``.
        cache: folder for the decoded arrays; ``<root>/.cache`` if None.

    Raises:
        DataError: folders or images are missing, broken or of several sizes.
        StorageError: the cache cannot be written.
    """
    root = _path(root)
    classes, files = _list_images(root)

    def decode() -> tuple[tuple[str, ...], Arrays]:
        arrays = _decode_images(root, files)
        if _list_images(root) != (classes, files):
            raise DataError(f"data.root={root} changed while its images were read. Start again when it is at rest.")
        return classes, arrays

    return _prepare(
        _cache_folder(root, cache), _fingerprint(root, files), lambda: _hash_files(root, files), decode, "data.cache"
    )


def synthetic(
    root: str | Path, *, train_count: int, test_count: int, num_classes: int = 10, image_size: int = 32, seed: int = 0
) -> DatasetFiles:
    """Shapes filled with textures, made on the spot: a convolutional network learns them, a linear model does not.

    Position, size, colours, contrast, phase and noise are random. The class survives a horizontal flip and a shift by
    an eighth of the image. The same settings give the same bytes on every machine.

    Args:
        root: folder that the images are kept in.
        train_count: training images, in balanced classes.
        test_count: test images, in balanced classes.
        num_classes: 2 to 10.
        image_size: height and width in pixels, 16 to 256.
        seed: of the random numbers.

    Raises:
        ConfigError: a setting is out of its range.
        StorageError: ``root`` cannot be written.
    """
    limits = {
        "train_count": (train_count, num_classes, 10**7),
        "test_count": (test_count, num_classes, 10**7),
        "num_classes": (num_classes, 2, len(_SYNTHETIC_CLASSES)),
        "image_size": (image_size, 16, 256),
        "seed": (seed, 0, 2**63 - 1),
    }
    for name, (value, low, high) in limits.items():
        if not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"data.{name}={value} must be a whole number from {low:,} to {high:,}")

    @cached
    def make() -> Arrays:
        counts = {"train": train_count, "test": test_count}
        return {
            split: _draw_split(counts[split], num_classes, image_size, np.random.PCG64([seed, number]))
            for number, split in enumerate(_SPLITS)
        }

    def content_hash() -> str:
        digest = hashlib.sha256()
        for split in _SPLITS:
            for array in make()[split]:
                digest.update(array.data)
        return digest.hexdigest()

    recipe = f"synthetic {_SYNTHETIC_VERSION} {train_count} {test_count} {num_classes} {image_size} {seed}"
    classes = _SYNTHETIC_CLASSES[:num_classes]
    return _prepare(_path(root).absolute(), recipe, content_hash, lambda: (classes, make()), "data.root")


def _path(path: str | Path) -> Path:
    return Path(path).expanduser()  # no shell expands the ~ in a YAML file


def _cache_folder(root: Path, cache: str | Path | None) -> Path:
    return (root / ".cache" if cache is None else _path(cache)).absolute()


# The cache: <cache>/<content hash>/{train,test}_{images,labels}.npy and meta.json, and <cache>/index.json, which says
# which content hash a source had when it last looked like this. It may be deleted at any time.

_FORMAT = 1  # of the files; another number means that they are made anew
_UNFINISHED = "unfinished-"


def _array_names(split: str) -> tuple[str, str]:
    return f"{split}_images.npy", f"{split}_labels.npy"


def _prepare(
    cache: Path,
    fingerprint: str,
    content_hash: Callable[[], str],
    decode: Callable[[], tuple[tuple[str, ...], Arrays]],
    setting: str,
) -> DatasetFiles:
    """The dataset's files: found by the fingerprint, else by the content hash, else decoded and written.

    A cache that has them is only read, so that it may lie on read-only storage and need no lock.

    Args:
        cache: absolute folder of all cached datasets of a source.
        fingerprint: what is cheap to know about the source; the same fingerprint means the same content.
        content_hash: the dear way to know: sha256 of the content, in hex.
        decode: class names and arrays.
        setting: the setting that names ``cache``.
    """
    found = _lookup(cache, fingerprint)
    if found is not None:
        return found
    with _locked(cache, setting):
        found = _lookup(cache, fingerprint)  # another process may have finished it while this one waited
        if found is not None:
            return found
        digest = content_hash()
        files = _open_cached(cache / digest)
        if files is None:
            classes, arrays = decode()
            with storage_errors(cache, _cache_advice(setting)):
                files = _write_cached(cache, digest, classes, arrays)
        with storage_errors(cache, _cache_advice(setting)):
            _write_index(cache, {**_read_index(cache), fingerprint: digest})
    return files


def _cache_advice(setting: str) -> str:
    return f"Make room, or choose a folder that can be written: {setting}=<folder>"


@contextmanager
def _locked(cache: Path, setting: str) -> Iterator[None]:
    """Hold the cache for writing, free of what a process that died left behind."""
    with storage_errors(cache, _cache_advice(setting)):
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / ".lock")
        lock.acquire()
    try:
        for leftover in cache.glob(f"{_UNFINISHED}*"):  # whoever held the lock is gone
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        lock.release()


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


def _lookup(cache: Path, fingerprint: str) -> DatasetFiles | None:
    digest = _read_index(cache).get(fingerprint)
    return None if digest is None else _open_cached(cache / str(digest))


def _open_cached(folder: Path) -> DatasetFiles | None:
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


def _file_bytes(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for split in _SPLITS for name in _array_names(split)}


def _write_cached(cache: Path, digest: str, classes: tuple[str, ...], arrays: Arrays) -> DatasetFiles:
    """Write the arrays, so that ``<cache>/<digest>`` is whole whenever it is there at all."""
    temporary = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=cache))
    try:
        temporary.chmod(0o755)  # mkdtemp's 0700 would keep a shared cache from everyone else
        for split, pair in arrays.items():
            arrays_of_split: tuple[NDArray[Any], ...] = pair
            for name, array in zip(_array_names(split), arrays_of_split, strict=True):
                with (temporary / name).open("wb") as file:
                    np.save(file, array, allow_pickle=False)
                    os.fsync(file.fileno())
        train_images = arrays["train"][0]
        mean, std = _channel_statistics(train_images)
        meta = {
            "format": _FORMAT,
            "file_bytes": _file_bytes(temporary),
            "classes": classes,
            "train_count": len(train_images),
            "test_count": len(arrays["test"][0]),
            "image_size": train_images.shape[2:],
            "mean": mean,
            "std": std,
            "content_hash": digest,
        }
        with (temporary / "meta.json").open("w", encoding="utf-8") as text:
            json.dump(meta, text, indent=1)
            text.flush()
            os.fsync(text.fileno())
        shutil.rmtree(cache / digest, ignore_errors=True)  # one that was not whole
        temporary.rename(cache / digest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    files = _open_cached(cache / digest)
    if files is None:
        raise OSError(f"{cache / digest} is not as it was written")
    return files


def _channel_statistics(images: NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all pixels, 0 to 255; exact, from counts of the 256 values."""
    counts = np.zeros((3, 256), dtype=np.int64)
    for start in range(0, len(images), 1024):  # bincount makes an int64 copy of what it counts
        for channel in range(3):
            counts[channel] += np.bincount(images[start : start + 1024, channel].ravel(), minlength=256)
    pixels, values = counts.sum(axis=1), np.arange(256)
    mean = counts @ values / pixels
    variance = (counts * (values - mean[:, None]) ** 2).sum(axis=1) / pixels
    return mean.tolist(), np.sqrt(variance).tolist()


# Class folders.

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_DECODERS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # not EPS and the like, which start other programs
_MAX_PIXELS = 4096 * 4096  # a small file can claim to be gigabytes of pixels
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # convert("RGB") would clip them to white
_SHOWN = 5  # paths in a message
_EXPECTED = (
    "Expected: <root>/train/<class>/*.png and <root>/test/<class>/*.png (or .jpg and others), the same classes in both."
)


class _ImageFile(NamedTuple):
    path: str  # relative to the root, with /
    label: int
    size: int  # bytes
    mtime_ns: int


Files = dict[str, list[_ImageFile]]


def _list_images(root: Path) -> tuple[tuple[str, ...], Files]:
    """Sorted class names, and the image files of each split, sorted by class and name.

    Raises:
        DataError: a folder or a class is missing, or a class has no images.
    """
    for folder in (root, *(root / split for split in _SPLITS)):
        if not folder.is_dir():
            raise DataError(
                f"data.root={root}: there is no folder {folder} (looked for {folder.absolute()}).\n{_EXPECTED}\n"
                "Name the folder with data.root=<folder>, let cifar-exp-data make it from the CIFAR-10 archive, "
                "or type experiment=quickstart, which needs no images."
            )
    try:
        names = {split: _visible_folders(root / split) for split in _SPLITS}
        _check_classes(root, names)
        classes = tuple(names["train"])
        files = {
            split: [file for label, name in enumerate(classes) for file in _list_class(root, f"{split}/{name}", label)]
            for split in _SPLITS
        }
    except OSError as error:
        raise DataError(f"data.root={root}: {error.filename} cannot be read: {error.strerror}") from error
    return classes, files


def _visible_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())


def _check_classes(root: Path, names: dict[str, list[str]]) -> None:
    if not names["train"] and not names["test"]:
        raise DataError(f"data.root={root}: there are no class folders in {root / 'train'}.\n{_EXPECTED}")
    for split, other in (_SPLITS, _SPLITS[::-1]):
        missing = [f"{split}/{name}" for name in names[other] if name not in names[split]]
        if missing:
            raise DataError(
                f"data.root={root}: {split} and {other} must have the same classes. Missing:\n{_shown(missing)}\n"
                f"Add the folders with their images, or remove the classes from {other}."
            )


def _list_class(root: Path, folder: str, label: int) -> list[_ImageFile]:
    with os.scandir(root / folder) as entries:
        images = [
            entry for entry in entries if not entry.name.startswith(".") and entry.name.lower().endswith(_SUFFIXES)
        ]
        stats = [(entry.name, entry.stat()) for entry in images if entry.is_file()]
    if not stats:
        raise DataError(
            f"data.root={root}: the class folder {root / folder} has no images ({', '.join(_SUFFIXES)}).\n"
            "Add some, or remove the class from both train and test."
        )
    return sorted(_ImageFile(f"{folder}/{name}", label, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def _shown(lines: list[str]) -> str:
    more = f"\n  and {len(lines) - _SHOWN:,} more" if len(lines) > _SHOWN else ""
    return "\n".join(f"  {line}" for line in lines[:_SHOWN]) + more


def _fingerprint(root: Path, files: Files) -> str:
    """What can be known of a tree without reading it: where it lies, and each file's path, size and time."""
    digest = hashlib.sha256(os.fsencode(root.absolute()))
    for file in (*files["train"], *files["test"]):
        digest.update(os.fsencode(f"\n{file.path}\0{file.size}\0{file.mtime_ns}"))
    return f"folders {digest.hexdigest()}"


def _hash_files(root: Path, files: Files) -> str:
    """Sha256 over each file's path and content."""
    digest = hashlib.sha256()
    everything = (*files["train"], *files["test"])
    with Progress("Looking for changed images", len(everything), "files") as progress:
        for file in everything:
            try:
                content = (root / file.path).read_bytes()
            except OSError as error:
                raise DataError(f"data.root={root}: {root / file.path} cannot be read: {error.strerror}") from error
            digest.update(os.fsencode(f"{file.path}\0{len(content)}\0"))
            digest.update(content)
            progress.add(1)
    return digest.hexdigest()


def _decode_images(root: Path, files: Files) -> Arrays:
    """All images of both splits.

    Raises:
        DataError: images are broken, or not all of one size.
    """
    everything = [*files["train"], *files["test"]]
    chunks = [everything[start : start + 256] for start in range(0, len(everything), 256)]
    decoded: list[NDArray[np.uint8] | str] = []
    with ThreadPoolExecutor() as pool, Progress("Reading images", len(everything), "files") as progress:
        for part in pool.map(lambda chunk: [_decode_image(root / file.path) for file in chunk], chunks):
            decoded += part
            progress.add(len(part))
    _check_images(root, everything, decoded)
    images = np.stack([image for image in decoded if not isinstance(image, str)])
    labels = np.array([file.label for file in everything], dtype=np.int64)
    count = len(files["train"])
    return {"train": (images[:count], labels[:count]), "test": (images[count:], labels[count:])}


def _decode_image(path: Path) -> NDArray[np.uint8] | str:
    """The image (3, H, W) uint8, or what is wrong with the file."""
    try:
        with Image.open(path, formats=_DECODERS) as image:  # reads the header alone
            if image.width * image.height > _MAX_PIXELS:
                return f"claims {image.width} x {image.height} pixels, more than {_MAX_PIXELS:,} in all"
            if image.mode in _DEEP_MODES:
                return f"has more than 8 bits a channel (mode {image.mode})"
            # A palette may hold transparency, and Pillow warns where it goes straight to RGB.
            opaque = image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")
            return np.ascontiguousarray(np.asarray(opaque).transpose(2, 0, 1))
    except Exception as error:  # decoders raise nearly anything on damaged files
        if path.stat().st_size == 0:
            return "is empty"
        return "is no image of a known format" if isinstance(error, UnidentifiedImageError) else str(error)


def _check_images(root: Path, files: Iterable[_ImageFile], decoded: list[NDArray[np.uint8] | str]) -> None:
    broken = [
        f"{root / file.path}: {image}" for file, image in zip(files, decoded, strict=True) if isinstance(image, str)
    ]
    if broken:
        raise DataError(
            f"data.root={root}: {len(broken):,} of {len(decoded):,} images cannot be used:\n{_shown(broken)}\n"
            "Replace or delete them."
        )
    sizes = [(image.shape[2], image.shape[1]) for image in decoded if not isinstance(image, str)]
    (width, height), _ = Counter(sizes).most_common(1)[0]
    odd = [
        f"{root / file.path}: {size[0]} x {size[1]}"
        for file, size in zip(files, sizes, strict=True)
        if size != (width, height)
    ]
    if odd:
        raise DataError(
            f"data.root={root}: all images must have one size. Most have {width} x {height} pixels, but not these "
            f"{len(odd):,} of {len(sizes):,}:\n{_shown(odd)}\nResize or delete them."
        )


# Synthetic images. Random numbers are taken as uniform floats and bytes, and the arithmetic is that which IEEE 754
# rounds the same way everywhere: no sines, no normal deviates.

_SYNTHETIC_VERSION = 1  # changes whenever the images do
_SHAPES = ("cross", "disc", "ring", "square", "triangle")
_SYNTHETIC_CLASSES = tuple(f"{shape}-{texture}" for shape in _SHAPES for texture in ("checks", "stripes"))
_NOISE = 16.0  # largest change of a pixel by noise


def _draw_split(
    count: int, num_classes: int, image_size: int, bits: np.random.PCG64
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (count, 3, S, S) uint8 and balanced labels in random order."""
    rng = np.random.Generator(bits)
    labels = np.argsort(rng.random(count), kind="stable") % num_classes
    images = np.empty((count, 3, image_size, image_size), dtype=np.uint8)
    for start in range(0, count, 1024):  # in pieces that fit the processor's cache
        images[start : start + 1024] = _draw(labels[start : start + 1024], image_size, rng)
    return images, labels.astype(np.int64)


def _draw(labels: NDArray[np.int64], image_size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Images (N, 3, S, S), 0 to 255: background + mask * texture * contrast + noise."""

    def uniform(low: float, high: float, channels: int = 1) -> NDArray[np.float32]:
        numbers = low + (high - low) * rng.random((len(labels), channels, 1, 1))
        return numbers.astype(np.float32)

    unit = np.float32(image_size / 32)  # lengths are given for images of 32 pixels
    centres = np.arange(image_size, dtype=np.float32) + np.float32(0.5)
    x = centres[None, None, None, :] - uniform(12, 20) * unit
    y = centres[None, None, :, None] - uniform(12, 20) * unit
    mask = _shape_mask(x, y, uniform(7.5, 10.5) * unit, labels[:, None, None, None] // 2)
    period = uniform(2, 3.5) * unit
    columns, rows = (np.floor((along + uniform(0, 8) * unit) / period).astype(np.int32) & 1 for along in (x, y))
    stripes = np.where(uniform(0, 1) < 0.5, columns, rows)  # of either direction
    texture = np.where(labels[:, None, None, None] % 2 == 0, columns ^ rows, stripes)
    # Either sign for each channel: the mean image of a class is flat, so a linear model finds nothing.
    contrast = uniform(50, 100, 3) * np.where(uniform(0, 1, 3) < 0.5, -1, 1).astype(np.float32)
    background = uniform(80, 176, 3)
    noise = rng.integers(0, 256, (len(labels), 3, image_size, image_size), dtype=np.uint8).astype(np.float32)
    pattern = (mask * (2 * texture - 1)).astype(np.float32)
    images = background + pattern * contrast + (noise - np.float32(127.5)) * np.float32(_NOISE / 127.5)
    clipped: NDArray[np.float32] = np.clip(images, 0, 255)
    return clipped


def _shape_mask(
    x: NDArray[np.float32], y: NDArray[np.float32], radius: NDArray[np.float32], shapes: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which pixels lie in the shape: (N, 1, S, S), for offsets x, y from its centre and an index into ``_SHAPES``.

    Every shape is its own mirror image, so that a horizontal flip keeps the class.
    """
    across, down = np.abs(x), np.abs(y)
    far, near, square = np.maximum(across, down), np.minimum(across, down), x * x + y * y
    disc = square <= radius * radius
    choices = {
        "cross": (far <= radius) & (near <= 0.34 * radius),
        "disc": disc,
        "ring": disc & (square >= 0.3 * radius * radius),
        "square": far <= 0.85 * radius,
        "triangle": (y <= 0.8 * radius) & (across <= 0.55 * (y + radius)),
    }
    return np.choose(shapes, [choices[name] for name in _SHAPES])
