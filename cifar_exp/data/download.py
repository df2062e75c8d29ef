"""Download the CIFAR-10 archive once, resume an interrupted download, and always verify size and sha256.

Source: https://www.cs.toronto.edu/~kriz/cifar.html
"""

import base64
import hashlib
import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from cifar_exp.data.cifar10_archive import ARCHIVE_FILE
from cifar_exp.errors import ConfigError, DataError, storage_errors
from cifar_exp.system.atomic_files import complete
from cifar_exp.system.locks import locked
from cifar_exp.system.progress_line import Progress

ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SIZE = 170_498_071  # bytes
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
_TIMEOUT = 30.0  # seconds without data
_CHUNK = 2**20  # bytes
_GZIP = b"\x1f\x8b"
_REMEDY = f"""Set one of these instead:
  data.archive=<file>     a copy of {ARCHIVE_FILE} that is on this machine
  data.mirror=<address>   another address of the same file
  data=folders data.root=<folder>   images of your own, in train/<class>/ and test/<class>/
  experiment=quickstart   synthetic images, no download"""


def fetch_archive(root: Path, *, mirror: str | None, archive: str | Path | None) -> Path:
    """The verified archive: ``archive`` if given, else ``root / ARCHIVE_FILE``, which is downloaded if missing.

    Args:
        root: folder for the download, created if missing.
        mirror: address to download from instead of the release's own.
        archive: a local copy; then the network and ``root`` are not used.

    Raises:
        ConfigError: the mirror is no http or https address.
        DataError: the archive cannot be downloaded or read, or its size or sha256 is wrong.
        StorageError: ``root`` cannot be written.
    """
    if archive is not None:
        path = Path(archive).expanduser()
        if not path.is_file():
            raise DataError(f"data.archive={archive} is not a file (looked for {path.absolute()}).\n{_REMEDY}")
        _check(path, f"data.archive={archive}", f"It must be {ARCHIVE_FILE} as it was released.")
        return path
    address = mirror or ADDRESS
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"data.mirror={address} must begin with http:// or https://. Set data.mirror=https://..., or "
            f"data.archive=<file> for a local file"
        )
    target = root / ARCHIVE_FILE
    advice = "Set data.root=<folder> to another folder, or free space in this one."
    with locked(root / f".{ARCHIVE_FILE}.lock", advice):
        if target.exists():
            mend = "Delete it to download it again, or set data.archive=<file> to another copy"
            _check(target, str(target), mend)
            return target
        part = target.with_suffix(".gz.part")
        with storage_errors(target, advice):
            _download(address, part, advice)
            complete(part, target)
        return target


def _problem(path: Path) -> str | None:
    """How a file differs from the release's size and sha256; None if it does not."""
    found_size = path.stat().st_size
    if found_size != SIZE:
        return f"{found_size:,} bytes where {SIZE:,} are expected"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == SHA256 else f"sha256 {found} where {SHA256} is expected"


def _check(path: Path, name: str, advice: str) -> None:
    try:
        problem = _problem(path)
    except OSError as error:
        problem = f"no readable content ({error.strerror or error})"
    if problem is not None:
        raise DataError(f"{name} is not the CIFAR-10 archive: it has {problem}.\n{advice}")


def _download(address: str, part: Path, advice: str) -> None:
    """Download to ``part``, resuming an earlier download, until size and sha256 are right."""
    while True:
        begun = part.stat().st_size if part.exists() else 0
        if begun < SIZE:
            _receive(address, part, begun, advice)
        problem = _problem(part)
        if problem is None:
            return
        part.unlink()
        if not begun:
            raise DataError(f"The file at {address} is not the CIFAR-10 archive: it has {problem}.\n{_REMEDY}")


def _receive(address: str, part: Path, begun: int, advice: str) -> None:
    """Append the bytes from position ``begun`` to ``part``, or write the whole file if the server sends all of it."""
    with _network_errors(address), _request(address, begun) as response:
        resumes = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {begun}-")
        received = begun if resumes else 0
        promised = response.headers.get("Content-Length")
        chunk = response.read(_CHUNK)
        if not received and not chunk.startswith(_GZIP):
            raise DataError(
                f"{address} did not send the archive, but perhaps a login page. "
                f"It begins with {chunk[:40]!r}.\n{_REMEDY}"
            )
        if promised is not None and received + int(promised) != SIZE:
            found = received + int(promised)
            raise DataError(
                f"The file at {address} is not the CIFAR-10 archive: it has {found:,} bytes where {SIZE:,} are "
                f"expected.\n{_REMEDY}"
            )
        with storage_errors(part, advice):
            file = part.open("ab" if resumes else "wb")
        with file, Progress("Downloading CIFAR-10", SIZE, "bytes") as progress:
            progress.add(received)
            while chunk and received <= SIZE:
                with storage_errors(part, advice):
                    file.write(chunk)
                    file.flush()
                received += len(chunk)
                progress.add(len(chunk))
                chunk = response.read(_CHUNK)
    if received < SIZE:
        raise DataError(
            f"The connection to {address} ended after {received:,} of {SIZE:,} bytes. They are kept in {part}: "
            f"start again to resume.\n{_REMEDY}"
        )


def _request(address: str, begun: int) -> Any:
    """Open the server's response. It has the whole file if the server cannot send the range from ``begun``."""
    if not begun:
        return _open(address, {})
    try:
        return _open(address, {"Range": f"bytes={begun}-"})
    except HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        return _open(address, {})


def _open(address: str, headers: dict[str, str]) -> Any:
    """The response to one request. User name and password in the address are sent, which urllib does not do."""
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
    """Turn network errors of the block into a ``DataError``."""
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
    raise DataError(f"CIFAR-10 cannot be downloaded from {address}: {reason}.\n{_REMEDY}")
