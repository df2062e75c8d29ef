"""The CIFAR-10 release: fetched once, verified always, and read without trusting what is in it.

The archive is a tar of pickles, two formats that can write anywhere and run anything. So no member is unpacked to disk,
and the pickles are read by an unpickler that knows arrays and nothing else.

Source: https://www.cs.toronto.edu/~kriz/cifar.html
"""

import base64
import hashlib
import http.client
import io
import pickle
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

import numpy as np
from numpy.typing import NDArray

from cifar_exp.array_cache import Arrays, locked
from cifar_exp.errors import ConfigError, DataError, storage_errors

ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
FILE_NAME = "cifar-10-python.tar.gz"
SIZE = 170_498_071  # bytes
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"

_FOLDER = "cifar-10-batches-py"
_TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_READ = (*_TRAIN_BATCHES, "test_batch", "batches.meta")
_IGNORED = (_FOLDER, f"{_FOLDER}/readme.html")
_MAX_MEMBER = 64 * 2**20  # bytes; a batch of the release has 31 MB, and gzip could blow up to anything
_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 2**20  # bytes
_GZIP = b"\x1f\x8b"

_WHAT_TO_TYPE = f"""What to type instead:
  data.archive=<file>     a copy of {FILE_NAME} that is on this machine
  data.mirror=<address>   another address of the same file
  data=folders data.root=<folder>   images of your own, in train/<class>/ and test/<class>/
  experiment=quickstart   synthetic images, no download"""


class Progress:
    """One line on stderr that counts up, where stderr is a terminal; nothing elsewhere."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done, self._shown_at = 0, 0.0
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def add(self, count: int) -> None:
        self._done += count
        if self._terminal and time.monotonic() - self._shown_at > 0.2:
            self._shown_at = time.monotonic()
            sys.stderr.write(f"\r{self._what}: {self._done:,} of {self._total:,} {self._unit}")
            sys.stderr.flush()

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        if self._shown_at:
            sys.stderr.write("\r\033[K")  # back to the line's start, and clear it


def fetch(root: Path, *, mirror: str | None, archive: str | Path | None, size: int, sha256: str) -> Path:
    """The verified archive: ``archive`` where it is given, else ``root / FILE_NAME``, downloaded if it is not there.

    Args:
        root: folder that a download goes to, made if missing.
        mirror: address to download from instead of the release's own.
        archive: a local copy; then there is no network access, and ``root`` is not touched.
        size: of the archive in bytes.
        sha256: of the archive, in hex.

    Raises:
        ConfigError: the mirror is no http or https address.
        DataError: there is no archive to be had, or not the right one.
        StorageError: ``root`` cannot be written.
    """
    if archive is not None:
        path = Path(archive).expanduser()
        if not path.is_file():
            raise DataError(f"data.archive={archive} is no file (looked for {path.absolute()}).\n{_WHAT_TO_TYPE}")
        _check(path, f"data.archive={archive}", size, sha256, f"It must be {FILE_NAME} as it was released.")
        return path
    address = mirror or ADDRESS
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"data.mirror={address} must begin with http:// or https://; a local file is data.archive=<file>"
        )
    target = root / FILE_NAME
    advice = "Choose another folder with data.root=<folder>, or make room in this one."
    with locked(root / f".{FILE_NAME}.lock", advice):
        if target.exists():
            mend = "Delete it to download it again, or name another: data.archive=<file>"
            _check(target, str(target), size, sha256, mend)
            return target
        part = target.with_suffix(".gz.part")
        with storage_errors(target, advice):
            _download(address, part, size, sha256, advice)
            part.replace(target)
        return target


def _problem(path: Path, size: int, sha256: str) -> str | None:
    """What is wrong with a file that must have this size and hash; None if nothing is."""
    found_size = path.stat().st_size
    if found_size != size:
        return f"{found_size:,} bytes where {size:,} are expected"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == sha256 else f"sha256 {found} where {sha256} is expected"


def _check(path: Path, name: str, size: int, sha256: str, advice: str) -> None:
    try:
        problem = _problem(path, size, sha256)
    except OSError as error:
        problem = f"no readable content ({error.strerror or error})"
    if problem is not None:
        raise DataError(f"{name} is not the CIFAR-10 archive: it has {problem}.\n{advice}")


def _download(address: str, part: Path, size: int, sha256: str, advice: str) -> None:
    """Fill ``part`` from ``address``, going on where an earlier download stopped, until size and hash are right."""
    while True:
        begun = part.stat().st_size if part.exists() else 0
        if begun < size:
            _receive(address, part, begun, size, advice)
        problem = _problem(part, size, sha256)
        if problem is None:
            return
        part.unlink()
        if not begun:
            raise DataError(f"The file at {address} is not the CIFAR-10 archive: it has {problem}.\n{_WHAT_TO_TYPE}")
        # The beginning came from an earlier try, perhaps from another mirror: once more, from nothing.


def _receive(address: str, part: Path, begun: int, size: int, advice: str) -> None:
    """Append the bytes from ``begun`` on to ``part``, or write all of it where the server sends all."""
    with _network_errors(address), _request(address, begun) as response:
        resumes = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {begun}-")
        received = begun if resumes else 0
        promised = response.headers.get("Content-Length")
        chunk = response.read(_CHUNK)
        if not received and not chunk.startswith(_GZIP):
            raise DataError(
                f"{address} answered with something else than an archive (a web page for logging in?). "
                f"It begins with {chunk[:40]!r}.\n{_WHAT_TO_TYPE}"
            )
        if promised is not None and received + int(promised) != size:
            found = received + int(promised)
            raise DataError(
                f"The file at {address} is not the CIFAR-10 archive: it has {found:,} bytes where {size:,} are "
                f"expected.\n{_WHAT_TO_TYPE}"
            )
        with storage_errors(part, advice):
            file = part.open("ab" if resumes else "wb")
        with file, Progress("Downloading CIFAR-10", size, "bytes") as progress:
            progress.add(received)
            while chunk and received <= size:
                with storage_errors(part, advice):
                    file.write(chunk)
                    file.flush()
                received += len(chunk)
                progress.add(len(chunk))
                chunk = response.read(_CHUNK)
    if received < size:
        raise DataError(
            f"The connection to {address} ended after {received:,} of {size:,} bytes. They are kept in {part}: "
            f"start again to go on from there.\n{_WHAT_TO_TYPE}"
        )


def _request(address: str, begun: int) -> Any:
    """The open answer of the server; the whole file where it has nothing from ``begun`` on."""
    if not begun:
        return _open(address, {})
    try:
        return _open(address, {"Range": f"bytes={begun}-"})
    except HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        return _open(address, {})


def _open(address: str, headers: dict[str, str]) -> Any:
    """The answer to one request. A user's name and password in the address, which urllib does not know, are sent."""
    parts = urlsplit(address)
    user_info, _, host = parts.netloc.rpartition("@")
    request = Request(
        urlunsplit(parts._replace(netloc=host)),
        headers={"User-Agent": "cifar-exp", "Accept-Encoding": "identity", **headers},
    )
    if user_info:
        login = base64.b64encode(unquote(user_info).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {login}")  # for this server alone
    return urlopen(request, timeout=_TIMEOUT)


@contextmanager
def _network_errors(address: str) -> Iterator[None]:
    """Turn what a network can do to the block into a ``DataError``."""
    try:
        yield
    except HTTPError as error:
        reason: object = f"the server answered {error.code} {error.reason}"
    except URLError as error:
        reason = getattr(error.reason, "strerror", None) or error.reason
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    else:
        return
    raise DataError(f"CIFAR-10 cannot be downloaded from {address}: {reason}.\n{_WHAT_TO_TYPE}")


def read_archive(path: Path) -> tuple[tuple[str, ...], Arrays]:
    """The class names and the images of an archive of the release's format; nothing is written to disk.

    Raises:
        DataError: a member or a pickle is not what the release has.
    """
    members = _read_members(path)
    try:
        classes = tuple(name.decode("ascii") for name in _unpickle(members["batches.meta"], path)[b"label_names"])
        train = [_batch(_unpickle(members[name], path), len(classes)) for name in _TRAIN_BATCHES]
        test = _batch(_unpickle(members["test_batch"], path), len(classes))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} does not hold CIFAR-10 batches: {error!r}. {_REPLACE}") from error
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return classes, {"train": (images, labels), "test": test}


_REPLACE = f"Delete it and start again, or name a sound copy of {FILE_NAME}: data.archive=<file>"


def _read_members(path: Path) -> dict[str, bytes]:
    """Content of the members that are needed, by name without the folder."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                if member.name in _IGNORED and (member.isdir() or member.isreg()):
                    continue
                if folder != _FOLDER or name not in _READ or not member.isreg() or member.size > _MAX_MEMBER:
                    kind = (
                        "a link to " + member.linkname if member.islnk() or member.issym() else f"{member.size:,} bytes"
                    )
                    raise DataError(f"{path} holds {member.name!r} ({kind}), which the release does not. {_REPLACE}")
                file = archive.extractfile(member)
                assert file is not None  # regular files have content
                contents[name] = file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path} cannot be read as a .tar.gz archive: {error}. {_REPLACE}") from error
    missing = [name for name in _READ if name not in contents]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}. {_REPLACE}")
    return contents


def _batch(batch: dict[bytes, Any], class_count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 of one unpickled batch."""
    data = batch[b"data"]
    if type(data) is not np.ndarray or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 32 * 32:
        raise ValueError("data must be a uint8 array of N x 3072")
    labels = np.array(batch[b"labels"], dtype=np.int64)
    if labels.shape != (len(data),) or labels.min(initial=0) < 0 or labels.max(initial=0) >= class_count:
        raise ValueError(f"labels must be {len(data)} numbers from 0 to {class_count - 1}")
    return data.reshape(-1, 3, 32, 32), labels


_RECONSTRUCT: Any = np.empty(0).__reduce__()[0]  # lies in numpy.core or numpy._core, as numpy's version has it
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numbers, bytes, lists, dictionaries and numpy arrays; no other name is ever looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise DataError(f"a pickle in it asks for {module}.{name}, which is not run")
        return _ALLOWED[module, name]


def _unpickle(content: bytes, path: Path) -> dict[bytes, Any]:
    """The dictionary in a pickle of the release, which Python 2 wrote: its strings are bytes here."""
    try:
        loaded = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{path} is refused: {error}. {_REPLACE}") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path} holds a damaged batch: {error!r}. {_REPLACE}") from error
    if not isinstance(loaded, dict):
        raise DataError(f"{path} holds a batch that is no dictionary but {type(loaded).__name__}. {_REPLACE}")
    return loaded
