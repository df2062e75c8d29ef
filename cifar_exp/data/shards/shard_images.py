"""Images that are read from shards while training."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar_exp.data.image_files import Images, LoaderFiles
from cifar_exp.data.image_reader import MAX_BYTES, EncodedImage, Preprocessing, read_image
from cifar_exp.data.presence import SplitName
from cifar_exp.data.shards.mds_index import PixelImage
from cifar_exp.data.shards.places import Place, StoredFile, read_part
from cifar_exp.errors import DataError
from cifar_exp.system.printable import printable

LISTED = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("size", "<i8")])


@dataclass(frozen=True)
class Shard:
    """A shard, as a rank reads it.

    Attributes:
        stored: the file.
        raw_bytes: its size after decompression.
        is_compressed: it can be read only from its copy.
        is_pixels: images are raw pixels, not image files.
        copy: a copy on this machine; None if there is none.
    """

    stored: StoredFile
    raw_bytes: int
    is_compressed: bool
    is_pixels: bool
    copy: Path | None


@dataclass(frozen=True)
class ShardImages:
    """The images of a split.

    Attributes:
        place: where the shards are stored.
        shards: those of both splits.
        listed: number of the shard, offset and size in bytes of each image, (N,) of type ``LISTED``.
        rule: how the images are read.
    """

    place: Place
    shards: tuple[Shard, ...]
    listed: NDArray[np.void]
    rule: Preprocessing

    def __len__(self) -> int:
        return len(self.listed)

    def __getitem__(self, place: int) -> Tensor | str:
        number, offset, size = (int(value) for value in self.listed[place])
        shard = self.shards[number]
        name = f"{printable(shard.stored.name)}, image at byte {offset:,}"
        if not 0 <= size <= MAX_BYTES:
            return self._problem(f"{name}: has {size:,} bytes, more than {MAX_BYTES:,}")
        try:
            content = self._content(shard, offset, size)
        except DataError as error:
            return str(error)
        if len(content) != size:
            return self._problem(f"{name}: the shard is cut or was changed since the start")
        image = read_image((PixelImage if shard.is_pixels else EncodedImage)(name, content), self.rule)
        return self._problem(image) if isinstance(image, str) else image

    def _content(self, shard: Shard, offset: int, size: int) -> bytes:
        if shard.copy is not None:
            try:
                return read_part(shard.copy, shard.stored.version, offset, size)
            except OSError as error:
                if shard.is_compressed:
                    raise DataError(
                        f"data.cache: {shard.copy} cannot be read: {error.strerror}. Start again: it is written again."
                    ) from error
        return self.place.part(shard.stored, offset, size)

    def _problem(self, problem: str) -> str:
        return f"data.root={self.place.address}: {problem}. Write the shard again."


@dataclass(frozen=True, kw_only=True)
class ShardFiles(LoaderFiles):
    """A dataset of shards. ``folder`` holds the places of the images in them, and the labels.

    Attributes:
        place: where the shards are stored.
        shards: those of both splits.
    """

    place: Place
    shards: tuple[Shard, ...]

    def images(self, split: SplitName) -> Images:
        return ShardImages(self.place, self.shards, self._mapped(list_names(split)[0]), self.preprocessing)

    def labels(self, split: SplitName) -> Tensor:
        return torch.from_numpy(self._mapped(list_names(split)[1]))


def list_names(split: SplitName) -> tuple[str, str]:
    """File names of a split's places and labels."""
    return f"{split}_places.npy", f"{split}_labels.npy"
