"""MosaicML streaming (MDS): ``index.json`` and binary shards with columns.

Format: https://github.com/mosaicml/streaming, ``streaming/base/format/mds``. A shard is the number of samples N as
uint32, N + 1 offsets as uint32, a description, then the samples. A sample is the sizes of its columns of variable
length as uint32, then the columns. All numbers are little-endian.
"""

import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cifar_exp.data.image_reader import MAX_PIXELS, EncodedImage
from cifar_exp.data.shards.samples import PLACE, BadShardError, Columns, ShardIndex
from cifar_exp.system.foreign_files import fields_from_json
from cifar_exp.system.printable import printable

INDEX_FILE = "index.json"
MAX_INDEX = 2**28  # bytes of index.json: 300,000 shards
_PIXELS = "pil"
_IMAGES = ("jpeg", "png", "bytes", _PIXELS)
_LABELS = {
    **{"int": "<i8", "int8": "<i1", "int16": "<i2", "int32": "<i4", "int64": "<i8"},
    **{"uint8": "<u1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8"},
}
_MODES = ("1", "L", "LA", "RGB", "RGBA", "CMYK")  # not P: its palette is not stored


@dataclass(frozen=True)
class MdsShard:
    """A shard as ``index.json`` describes it.

    Attributes:
        name: file name below the split's folder, as stored.
        stored_bytes: size of that file.
        raw_bytes: size after decompression.
        compression: how it is compressed, such as ``zstd``; empty if it is not.
        hashes: of the stored file, by algorithm.
        count: samples.
        columns: name, encoding, and size in bytes or None if it varies.
    """

    name: str
    stored_bytes: int
    raw_bytes: int
    compression: str
    hashes: tuple[tuple[str, str], ...]
    count: int
    columns: tuple[tuple[str, str, int | None], ...]


def read_index(content: bytes, stored: Mapping[str, int]) -> list[MdsShard]:
    """The shards that ``index.json`` lists.

    Args:
        content: of ``index.json``.
        stored: the files below the split's folder, with their sizes. The index can name no others.

    Raises:
        BadShardError: it has another form, or a shard is missing or has another size.
    """
    try:
        entries = fields_from_json(content)["shards"]
        shards = [_entry(fields, stored) for fields in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadShardError(f"{INDEX_FILE} is not an index of MDS ({type(error).__name__})") from error
    for shard in shards:
        found = stored.get(shard.name)
        if found is None:
            raise BadShardError(f"the shard {printable(shard.name)}, which {INDEX_FILE} lists, is missing")
        if found != shard.stored_bytes:
            raise BadShardError(
                f"the shard {printable(shard.name)} has {found:,} bytes, and {INDEX_FILE} says {shard.stored_bytes:,}"
            )
    if repeated := [name for name, count in Counter(shard.name for shard in shards).items() if count > 1]:
        raise BadShardError(f"{INDEX_FILE} lists the shard {printable(repeated[0])} twice")
    return shards


def _entry(fields: Mapping[str, Any], stored: Mapping[str, int]) -> MdsShard:
    if fields["format"] != "mds":
        shown = printable(repr(fields["format"]))[:60]
        raise BadShardError(f"{INDEX_FILE} has shards of the format {shown}; only 'mds' is read")
    raw, packed = fields["raw_data"], fields["zip_data"]
    is_packed = packed is not None and raw["basename"] not in stored
    file = packed if is_packed else raw
    numbers = [file["bytes"], raw["bytes"], fields["samples"]]
    if any(type(number) is not int or not 0 <= number < 2**40 for number in numbers):
        raise ValueError("sizes")
    columns = zip(fields["column_names"], fields["column_encodings"], fields["column_sizes"], strict=True)
    return MdsShard(
        name=str(file["basename"]),
        stored_bytes=numbers[0],
        raw_bytes=numbers[1],
        compression=str(fields["compression"]).partition(":")[0] if is_packed else "",
        hashes=tuple((str(kind), str(value)) for kind, value in file["hashes"].items()),
        count=numbers[2],
        columns=tuple((str(name), str(kind), None if size is None else int(size)) for name, kind, size in columns),
    )


def index_mds(path: Path, shard: MdsShard, wanted: Columns) -> ShardIndex:
    """The images and labels of a decompressed shard.

    Raises:
        BadShardError: it is damaged, or has no column for the image or the label.
        OSError: it cannot be read.
    """
    image = _column(shard, wanted.image, "image", _IMAGES)
    label = _column(shard, wanted.label, "label", tuple(_LABELS))
    if not shard.count:
        return ShardIndex(np.empty(0, PLACE), False, Counter())
    size = path.stat().st_size
    if size != shard.raw_bytes or size < 8 + 4 * shard.count:
        raise BadShardError(f"has {size:,} bytes, and {INDEX_FILE} says {shard.raw_bytes:,}")
    content = np.memmap(path, dtype=np.uint8, mode="r")
    starts, ends = _bounds(content, shard.count)
    places = np.empty(shard.count, PLACE)
    columns = _column_places(content, starts, ends, [size for _, _, size in shard.columns])
    places["offset"], places["size"] = columns[image]
    offsets, _ = columns[label]
    kind = np.dtype(_LABELS[shard.columns[label][1]])
    labels = _gathered(content, offsets, kind.itemsize).view(kind)[:, 0]
    if (labels > 10**18).any():
        raise BadShardError(f"has a label of {labels.max():,}")
    places["label"] = labels
    return ShardIndex(places, shard.columns[image][1] == _PIXELS, Counter())


def _column(shard: MdsShard, wanted: str, what: str, kinds: Sequence[str]) -> int:
    """The number of the column for the image or the label."""
    fitting = [
        number for number, (name, kind, _) in enumerate(shard.columns) if wanted in ("auto", name) and kind in kinds
    ]
    named = [number for number in fitting if shard.columns[number][0] == what]  # among several, the one so called
    if len(fitting) == 1 or named:
        return (named or fitting)[0]
    shown = printable(", ".join(f"{name} ({kind})" for name, kind, _ in shard.columns))[:200]
    several = "several" if fitting else "no"
    raise BadShardError(
        f"has {several} columns that can be the {what} ({', '.join(kinds)}): {shown}. Set data.{what}=<column>"
    )


def _bounds(content: NDArray[np.uint8], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each sample starts and ends."""
    (found,) = struct.unpack("<I", content[:4].tobytes())
    if found != count:
        raise BadShardError(f"has {found:,} samples, and {INDEX_FILE} says {count:,}")
    bounds = np.frombuffer(content[4 : 8 + 4 * count].tobytes(), dtype="<u4").astype(np.int64)
    if bounds[0] < 8 + 4 * count or bounds[-1] > len(content) or (np.diff(bounds) < 0).any():
        raise BadShardError("has damaged offsets")
    return bounds[:-1], bounds[1:]


def _column_places(
    content: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64], sizes: Sequence[int | None]
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Offset and size of each column in each sample."""
    head = 4 * sizes.count(None)
    if (starts + head > ends).any():
        raise BadShardError("has samples that are cut")
    stated = iter(_gathered(content, starts, head).view("<u4").astype(np.int64).T)
    at, columns = starts + head, []
    for size in sizes:
        length = next(stated) if size is None else np.full(len(starts), size, dtype=np.int64)
        columns.append((at, length))
        at = at + length
    if (at != ends).any():
        raise BadShardError("has samples whose columns do not fill them")
    return columns


def _gathered(content: NDArray[np.uint8], offsets: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """(N, size): ``size`` bytes from each offset."""
    return np.ascontiguousarray(content[offsets[:, None] + np.arange(size)])


class PixelImage(EncodedImage):
    """Raw pixels, as MDS stores images of Pillow.

    They are width, height and length of the mode's name as uint32, that name, and the pixels.
    """

    def opened(self) -> Image.Image:
        width, height, length = struct.unpack("<III", self.content[:12])
        mode = self.content[12 : 12 + length].decode("ascii") if length < 8 else "?"
        if mode not in _MODES or not 0 < width * height <= MAX_PIXELS:
            raise ValueError(f"has {width} x {height} pixels of the mode {mode!r}")
        return Image.frombytes(mode, (width, height), self.content[12 + length :])
