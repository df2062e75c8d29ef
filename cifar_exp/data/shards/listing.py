"""Find the shards of a split."""

from collections.abc import Mapping
from functools import partial
from typing import Literal

from cifar_exp.data.presence import SplitName
from cifar_exp.data.shards import mds_index
from cifar_exp.data.shards.places import Place, StoredFile
from cifar_exp.data.shards.samples import BadShardError, Columns
from cifar_exp.data.shards.store import ShardFile
from cifar_exp.data.shards.tar_index import index_tar
from cifar_exp.errors import DataError

_TAR, _PACKED_TAR = ".tar", (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
Format = Literal["auto", "webdataset", "mds"]


def shards_of(place: Place, split: SplitName, wanted: Format, columns: Columns) -> list[ShardFile]:
    """The shards of a split.

    Raises:
        DataError: there are none, or they are of both formats.
    """
    files = {file.name.removeprefix(f"{split}/"): file for file in place.files(split)}
    has_index, tars = mds_index.INDEX_FILE in files, [name for name in files if name.endswith(_TAR)]
    where = f"data.root={place.address}: {split}/"
    if wanted == "auto" and has_index and tars:
        raise DataError(
            f"{where} has both {mds_index.INDEX_FILE} and tar files. Set data.format=mds or data.format=webdataset"
        )
    if has_index and wanted != "webdataset":
        shards = _mds_shards(place, split, files, columns)
    elif wanted == "mds":
        raise DataError(f"{where} has no {mds_index.INDEX_FILE}. Write it there, or set data.format=webdataset")
    else:
        shards = [_tar(files[name], columns) for name in tars]
    if not shards:
        packed = [name for name in files if name.endswith(_PACKED_TAR)]
        raise DataError(
            f"{where} has no shards. Expected: {split}/*.tar (WebDataset), or {split}/{mds_index.INDEX_FILE} with .mds "
            f"files (MosaicML streaming)"
            + (". Compressed tar files cannot be read from the middle; decompress them" if packed else "")
            + ". Set data.root=<folder or s3://bucket/prefix>"
        )
    return shards


def _tar(file: StoredFile, columns: Columns) -> ShardFile:
    return ShardFile(file, file.size, "", {}, f"webdataset {columns}", partial(index_tar, columns=columns))


def _mds_shards(place: Place, split: SplitName, files: Mapping[str, StoredFile], columns: Columns) -> list[ShardFile]:
    index = files[mds_index.INDEX_FILE]
    try:
        if index.size > mds_index.MAX_INDEX:
            raise BadShardError(f"{mds_index.INDEX_FILE} has {index.size:,} bytes, more than {mds_index.MAX_INDEX:,}")
        listed = mds_index.read_index(place.content(index), {name: file.size for name, file in files.items()})
    except BadShardError as error:
        raise DataError(f"data.root={place.address}: {split}/: {error}. Write the shards again") from error
    return [
        ShardFile(
            files[shard.name],
            shard.raw_bytes,
            shard.compression,
            dict(shard.hashes),
            f"mds {columns} {shard}",
            partial(mds_index.index_mds, shard=shard, wanted=columns),
        )
        for shard in listed
    ]
