"""Copies and indices of shards on this machine's disk.

``<cache>/shards/<hash>.shard`` is a downloaded or decompressed shard, ``<cache>/index/<hash>.npz`` the index of one.
No name from a stranger is a part of these paths.

In a random order every shard is equally likely to be read next, so it would not help to replace copies: the first
shards that fit into ``data.cache_limit`` are copied, and the others are read from the server image by image.
"""

import bz2
import gzip
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_exp.data.shards.places import Place, StoredFile
from cifar_exp.data.shards.samples import BadShardError, ShardIndex
from cifar_exp.errors import ConfigError, DataError, MachineError, storage_errors
from cifar_exp.system.atomic_files import atomic_path
from cifar_exp.system.printable import printable
from cifar_exp.system.progress_line import Progress

GB = 10**9
_THREADS = 8  # shards at a time
_FORMAT = 1  # version of the indices; those of another version are made again
_CHUNK = 2**20  # bytes
_COPY = re.compile(r"[0-9a-f]{64}\.shard")


@dataclass(frozen=True)
class ShardFile:
    """A shard, and how to index it.

    Attributes:
        stored: the file.
        raw_bytes: its size after decompression.
        compression: ``zstd``, ``gz``, ``bz2`` or empty.
        hashes: of the stored file by algorithm; algorithms that Python lacks are not checked.
        columns: describes what ``index`` takes from it.
        index: reads the index from the decompressed file.
    """

    stored: StoredFile
    raw_bytes: int
    compression: str
    hashes: Mapping[str, str]
    columns: str
    index: Callable[[Path], ShardIndex]

    @property
    def identity(self) -> str:
        """Hash of name, size and version."""
        return hashlib.sha256("\0".join(map(str, self.stored)).encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True)
class Store:
    """The copies and indices of one data set.

    Attributes:
        place: where the shards are stored.
        cache: absolute folder.
        limit: gigabytes of copies.
    """

    place: Place
    cache: Path
    limit: float

    def copies(self, shards: Sequence[ShardFile]) -> list[Path | None]:
        """The path of each shard's copy; None for a shard that is read where it is stored.

        Raises:
            ConfigError: compressed shards do not fit into the limit; they cannot be read image by image.
        """
        total, packed, paths = 0.0, 0, list[Path | None]()
        for shard in shards:
            is_needed = bool(shard.compression) or self.place.local(shard.stored) is None
            total += shard.raw_bytes if is_needed else 0
            packed += shard.raw_bytes if shard.compression else 0
            fits = is_needed and total <= self.limit * GB
            paths.append(self.cache / "shards" / f"{shard.identity}.shard" if fits else None)
        if any(shard.compression and path is None for shard, path in zip(shards, paths, strict=True)):
            raise ConfigError(
                f"data.cache_limit={self.limit:g}: compressed shards are read from decompressed copies, which need "
                f"{packed / GB:.3g} GB. Set data.cache_limit={-(-packed // GB)} and data.cache=<folder on a disk with "
                f"that much space>"
            )
        return paths

    def are_complete(self, shards: Sequence[ShardFile]) -> bool:
        """Whether every copy is there."""
        pairs = zip(shards, self.copies(shards), strict=True)
        return all(path is None or _size(path) == shard.raw_bytes for shard, path in pairs)

    def prepare(self, shards: Sequence[ShardFile]) -> list[ShardIndex]:
        """Download, decompress and index what is not yet there. The caller holds the lock of the cache.

        Raises:
            DataError: a shard cannot be read or is damaged.
            StorageError: the cache cannot be written.
        """
        copies = self.copies(shards)
        with storage_errors(self.cache, "Free space there, or set data.cache=<folder> or data.cache_limit=<less>"):
            for folder in ("shards", "index"):
                (self.cache / folder).mkdir(parents=True, exist_ok=True)
            self._remove_old(
                {path.name for path in copies if path},
                sum(shard.raw_bytes for shard, path in zip(shards, copies, strict=True) if path),
            )
            with ThreadPoolExecutor(_THREADS) as pool, Progress("Reading shards", len(shards), "shards") as progress:
                indices = []
                try:
                    for index in pool.map(self._prepared, shards, copies):
                        indices.append(index)
                        progress.add(1)
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
        return indices

    def _prepared(self, shard: ShardFile, copy: Path | None) -> ShardIndex:
        key = hashlib.sha256(f"{_FORMAT} {shard.identity} {shard.columns}".encode()).hexdigest()
        path = self.cache / "index" / f"{key}.npz"
        index = ShardIndex.read(path)
        if index is not None and (copy is None or _size(copy) == shard.raw_bytes):
            return index
        local = None if shard.compression else self.place.local(shard.stored)
        target = local or copy or self.cache / "shards" / f"{shard.identity}.part"
        try:
            if _size(target) != shard.raw_bytes and not local:
                self._copy(shard, target)
            index = index or _indexed(shard, target)
        except BadShardError as error:
            problem = f"the shard {printable(shard.stored.name)} {error}"
            remedy = "" if "Set " in problem else ". Write it again"
            raise DataError(f"data.root={self.place.address}: {problem}{remedy}.") from error
        finally:
            if not (local or copy):
                target.unlink(missing_ok=True)
        index.write(path)
        return index

    def _copy(self, shard: ShardFile, target: Path) -> None:
        """Download and decompress a shard, and check its size and hashes.

        Raises:
            BadShardError: they are wrong.
        """
        expected = {kind: value for kind, value in shard.hashes.items() if kind in hashlib.algorithms_available}
        digests = {kind: hashlib.new(kind, usedforsecurity=False) for kind in expected}
        written = 0
        with atomic_path(target, durable=False) as temporary, temporary.open("wb") as file:
            for chunk in unpacked(_hashed(_chunks(self.place, shard.stored), digests.values()), shard.compression):
                written += len(chunk)
                if written > shard.raw_bytes:
                    raise BadShardError(f"has more than {shard.raw_bytes:,} bytes after decompression")
                file.write(chunk)
            if written != shard.raw_bytes:
                raise BadShardError(f"has {written:,} bytes where {shard.raw_bytes:,} are expected")
            for kind, digest in digests.items():
                if digest.hexdigest() != expected[kind]:
                    raise BadShardError(f"is damaged: its {kind} is not the expected one")

    def _remove_old(self, names: set[str], needed: int) -> None:
        """Remove copies of other shards, oldest first, until the new ones fit into the limit."""
        copies = [path for path in (self.cache / "shards").iterdir() if _COPY.fullmatch(path.name)]
        others = sorted((path for path in copies if path.name not in names), key=lambda path: path.stat().st_mtime)
        total = needed + sum(path.stat().st_size for path in others)
        for path in others:
            if total <= self.limit * GB:
                return
            total -= path.stat().st_size
            with suppress(OSError):
                path.unlink()


def _size(path: Path) -> int:
    """In bytes; -1 if it is missing."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _indexed(shard: ShardFile, path: Path) -> ShardIndex:
    try:
        return shard.index(path)
    except OSError as error:
        raise BadShardError(f"cannot be read: {error.strerror}") from error


def _chunks(place: Place, file: StoredFile) -> Iterator[bytes]:
    local = place.local(file)
    if local is None:
        yield from place.download(file)
        return
    try:
        with local.open("rb") as opened:
            while chunk := opened.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise BadShardError(f"cannot be read: {error.strerror}") from error


def _hashed(chunks: Iterable[bytes], digests: Iterable["hashlib._Hash"]) -> Iterator[bytes]:
    digests = list(digests)
    for chunk in chunks:
        for digest in digests:
            digest.update(chunk)
        yield chunk


class _Stream(io.RawIOBase):
    """Chunks as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or next(self._chunks, b"")
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def unpacked(chunks: Iterator[bytes], compression: str) -> Iterator[bytes]:
    """The decompressed content, in chunks of limited size.

    Raises:
        BadShardError: it is damaged, or the compression is not supported.
        MachineError: a package for it is missing.
    """
    if not compression:
        yield from chunks
        return
    packed: Any = io.BufferedReader(_Stream(chunks), _CHUNK)
    file = _decompressing(packed, compression)
    while True:
        try:
            chunk = file.read(_CHUNK)
        except (DataError, BadShardError):
            raise
        except Exception as error:  # each library has its own
            raise BadShardError(f"is damaged: it cannot be decompressed ({printable(str(error))[:100]})") from error
        if not chunk:
            break
        yield chunk
    while packed.read(_CHUNK):  # what follows belongs to the hashes
        pass


def _decompressing(packed: Any, compression: str) -> Any:
    if compression == "gz":
        return gzip.GzipFile(fileobj=packed)
    if compression == "bz2":
        return bz2.BZ2File(packed)
    if compression != "zstd":
        raise BadShardError(
            f"is compressed with {printable(compression)[:40]}; zstd, gz and bz2 can be read. Write the shards with "
            f"one of these, or uncompressed"
        )
    try:
        import zstandard
    except ImportError as error:
        raise MachineError(
            "data.root: shards are compressed with zstd, and the package zstandard is missing. Run pip install "
            "'cifar-exp[shards]'"
        ) from error
    return zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(packed, read_across_frames=True)
