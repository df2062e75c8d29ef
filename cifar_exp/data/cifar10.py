"""CIFAR-10: downloaded once, verified by sha256, and decoded into the array cache."""

from dataclasses import replace
from pathlib import Path

from cifar_exp.data import cifar10_archive, download
from cifar_exp.data.array_cache import Decoded, check_decoded, dataset_cache, expanded, prepare
from cifar_exp.data.dataset_files import Arrays, DatasetFiles


def cifar10(
    root: str | Path,
    *,
    mirror: str | None,
    archive: str | Path | None,
    cache: str | Path | None,
    residency: Decoded,
) -> DatasetFiles:
    """CIFAR-10 as released: 50,000 training and 10,000 test images of 32 x 32 pixels in 10 classes, lossless.

    Once the archive is decoded, neither a download nor the archive is needed again. Source: Krizhevsky, Learning
    Multiple Layers of Features from Tiny Images, 2009.

    Args:
        root: folder that the archive is downloaded to.
        mirror: address to download from instead of the release's own.
        archive: a local copy of the archive; then nothing is downloaded.
        cache: folder for the decoded arrays; ``<root>/.cache`` if None.
        residency: where the images lie while ranks train, as in ``DatasetFiles``.

    Raises:
        ConfigError: the mirror is not an http or https address, or the residency is unknown.
        DataError: the archive cannot be downloaded or read, or its size or sha256 is wrong.
        StorageError: ``root`` or the cache cannot be written.
    """
    check_decoded(residency)
    root = expanded(root)

    def decode() -> tuple[tuple[str, ...], Arrays]:
        return cifar10_archive.read_archive(download.fetch_archive(root, mirror=mirror, archive=archive))

    files = prepare(
        dataset_cache(root, cache), f"archive {download.SHA256}", lambda: download.SHA256, decode, "data.cache"
    )
    return replace(files, residency=residency)
