"""Read files of an untrusted folder: regular files only, no links, of limited size and depth."""

import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

MIB = 2**20
LIMIT = 4 * MIB  # bytes; a file of facts about a run has a few thousand


class RefusedFileError(OSError):
    """A file that is not read: a link, not a regular file, or too large."""


def opened(path: Path, limit: float = LIMIT) -> BufferedReader:
    """Open a file for reading. It follows no link and never blocks, not even on a FIFO.

    Args:
        path: the file.
        limit: the largest size in bytes.

    Raises:
        RefusedFileError: it is a link, not a regular file, or too large.
        OSError: it cannot be opened.
    """
    if path.is_symlink():
        raise RefusedFileError(f"{path} is a link to {path.readlink()}, and links are not followed there")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise RefusedFileError(f"{path} is not a regular file")
        if about.st_size > limit:
            raise RefusedFileError(f"{path} has {about.st_size:,} bytes, and at most {limit:,.0f} are read")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_text(path: Path, limit: int = LIMIT) -> str:
    """The text of a file, UTF-8; for the errors see :func:`opened`. Another encoding is a ``ValueError``."""
    with opened(path, limit) as file:
        return file.read(limit + 1).decode("utf-8")


def read_json(path: Path, limit: int = LIMIT) -> Any:
    """The content of a JSON file; for the errors see :func:`opened`. Other content is a ``ValueError``."""
    return from_json(read_text(path, limit))


def read_json_object(path: Path, limit: int = LIMIT) -> dict[str, Any]:
    """The fields of a JSON file; for the errors see :func:`opened` and :func:`fields_from_json`."""
    return fields_from_json(read_text(path, limit))


def fields_from_json(text: str | bytes) -> dict[str, Any]:
    """The fields of a JSON text.

    Raises:
        ValueError: it is not a JSON object, or nested too deeply.
    """
    content = from_json(text)
    if not isinstance(content, dict):
        raise ValueError("it holds no fields")
    return content


def from_json(text: str | bytes) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error
