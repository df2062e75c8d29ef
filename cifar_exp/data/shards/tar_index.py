"""WebDataset: a tar file whose members ``key.jpg`` and ``key.cls`` (or ``key.json``) form a sample.

Format: https://github.com/webdataset/webdataset, ``tariterators.py``: the key is the member's path up to the first dot
of its last part, and the members of a sample follow each other. Members are read by offset; no member is extracted, and
no name of a member becomes a path.
"""

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from cifar_exp.data.image_tree import HIDDEN, IMAGE_SUFFIXES
from cifar_exp.data.shards.samples import BadShardError, Columns, ShardIndex, places_of
from cifar_exp.system.foreign_files import fields_from_json
from cifar_exp.system.printable import printable

LINK = "link{s} or special member{s}"
NO_IMAGE, NO_LABEL = "sample{s} without an image", "sample{s} without a label"
_BLOCK = tarfile.BLOCKSIZE  # 512 bytes
_MAX_CLS, _MAX_JSON = 64, 2**20  # bytes
_MAX_HEADER = 2**20  # bytes; a long name has a few thousand
_WHOLE = re.compile(rb"[+-]?\d{1,18}")
_Members = dict[str, tarfile.TarInfo]  # of one sample, by suffix without the first dot, in lower case


def index_tar(path: Path, columns: Columns) -> ShardIndex:
    """The images and labels of a tar file.

    Raises:
        BadShardError: it is no sound, uncompressed tar file, or a label is not a whole number.
        OSError: it cannot be read.
    """
    skipped: Counter[str] = Counter()
    rows: list[tuple[int, int, int]] = []
    with path.open("rb") as file:
        for key, members in _samples(file, skipped):
            image = _image(key, members, columns.image)
            label = _label_member(members, columns.label)
            if image is None or label is None:
                skipped[NO_IMAGE if image is None else NO_LABEL] += 1
            else:
                rows.append((image.offset_data, image.size, _label(file, *label)))
    return ShardIndex(places_of(rows), False, skipped)


def _samples(file: BufferedReader, skipped: Counter[str]) -> Iterator[tuple[str, _Members]]:
    """Each key with its members."""
    last, members = "", _Members()
    for member in _members(file):
        folder, _, name = member.name.rpartition("/")
        if member.isdir():
            continue
        if name.startswith("."):
            skipped[HIDDEN] += 1
            continue
        if not member.isreg() or member.issparse():
            skipped[LINK] += 1
            continue
        stem, _, suffix = name.partition(".")
        key = f"{folder}/{stem}"
        if key != last and members:
            yield last, members
            members = {}
        last, suffix = key, suffix.lower()
        if suffix in members:
            raise BadShardError(f"has two members {printable(member.name)}")
        members[suffix] = member
    if members:
        yield last, members


class _Headers:
    """The file as ``tarfile`` reads it: headers only. It would take as much memory as a header claims to need."""

    def __init__(self, file: BufferedReader) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise BadShardError(f"has a header of {size:,} bytes at byte {self.tell():,}")
        return self._read(size)


def _members(file: BufferedReader) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file that is complete.

    ``tarfile`` takes a damaged header in the middle and a missing end for the end of the archive.
    """
    try:
        with tarfile.open(fileobj=_Headers(file), mode="r:") as archive:  # type: ignore[call-overload]
            end = 0
            while member := archive.next():
                if archive.offset <= end:  # a negative size, which would be read without an end
                    raise BadShardError(f"has a damaged header at byte {member.offset:,}")
                end = archive.offset
                yield member
                archive.members.clear()  # it would keep every header in memory
            end = archive.offset
    except (BadShardError, OSError):
        raise
    except Exception as error:  # headers can make tarfile raise nearly anything
        raise BadShardError(f"is no sound tar file: {printable(str(error))[:200]}") from error
    _check_end(file, end)


def _check_end(file: BufferedReader, end: int) -> None:
    file.seek(end)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise BadShardError(f"is cut or damaged at byte {end:,}: the end marker of a tar file is missing there")
    while chunk := file.read(2**20):
        if chunk.count(0) != len(chunk):
            raise BadShardError(f"continues after its end marker at byte {end:,}, as joined tar files do")


def _image(key: str, members: _Members, wanted: str) -> tarfile.TarInfo | None:
    if wanted != "auto":
        return members.get(wanted.lower().removeprefix("."))
    found = [suffix for suffix in members if f".{suffix}" in IMAGE_SUFFIXES]
    if len(found) > 1:
        raise BadShardError(
            f"has several images in the sample {printable(key)}: {', '.join(found)}. Set data.image={found[0]} to use "
            f"that one"
        )
    return members[found[0]] if found else None


def _label_member(members: _Members, wanted: str) -> tuple[tarfile.TarInfo, str] | None:
    """The member that holds the label, and the field in it; empty for the whole member."""
    if wanted in ("auto", "cls") and "cls" in members:
        return members["cls"], ""
    if wanted != "cls" and "json" in members:
        return members["json"], "label" if wanted == "auto" else wanted
    return None


def _label(file: BufferedReader, member: tarfile.TarInfo, field: str) -> int:
    limit = _MAX_JSON if field else _MAX_CLS
    if member.size > limit:
        raise BadShardError(f"has a member {printable(member.name)} of {member.size:,} bytes, more than {limit:,}")
    place = file.tell()  # tarfile seeks by itself; this keeps its place all the same
    file.seek(member.offset_data)
    content = file.read(member.size)
    file.seek(place)
    if not field:
        if not _WHOLE.fullmatch(content.strip()):
            shown = printable(content.decode("utf-8", "replace"))
            raise BadShardError(f"has the label '{shown}' in {printable(member.name)}; a label is a whole number")
        return int(content)
    try:
        fields = fields_from_json(content)
    except ValueError as error:
        raise BadShardError(f"has a member {printable(member.name)} that is no JSON object") from error
    value = fields.get(field)
    if type(value) is not int or abs(value) > 10**18:
        raise BadShardError(
            f"has {printable(field)}={printable(repr(value))[:60]} in {printable(member.name)}; a label is a whole "
            f"number. Set data.label=<field of the .json with the label>"
        )
    return value
