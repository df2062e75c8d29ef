"""A small archive in the format of the CIFAR-10 release, and a server that hands it out."""

import hashlib
import io
import pickle
import struct
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest

from cifar_exp.data import cifar10_archive, download
from cifar_exp.data.cifar10 import cifar10
from cifar_exp.data.dataset_files import DatasetFiles

LABEL_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
FOLDER = "cifar-10-batches-py"
_PythonPickler: Any = pickle._Pickler  # the one in Python, whose way of writing a type can be replaced


class Python2Pickler(_PythonPickler):  # type: ignore[misc]
    """Writes byte strings as Python 2 did, which is how the release was pickled."""

    def save_bytes(self, value: bytes) -> None:
        short = len(value) < 256
        self.write(b"U" + bytes([len(value)]) + value if short else b"T" + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch: ClassVar = {**_PythonPickler.dispatch, bytes: save_bytes}


def release_pickle(value: Any) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    # The release names numpy's module as numpy 1 did.
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def make_batch(number: int) -> tuple[np.ndarray, list[int]]:
    """20 images as rows of 3072 bytes, two of each class."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (20, 3072), dtype=np.uint8), rng.permutation(20).__mod__(10).tolist()


def make_members() -> dict[str, bytes]:
    members = {}
    for number, name in enumerate(BATCHES):
        data, labels = make_batch(number)
        batch = {b"batch_label": name.encode(), b"labels": labels, b"data": data, b"filenames": [b"x.png"] * 20}
        members[f"{FOLDER}/{name}"] = release_pickle(batch)
    meta = {b"num_cases_per_batch": 20, b"label_names": [name.encode() for name in LABEL_NAMES], b"num_vis": 3072}
    members[f"{FOLDER}/batches.meta"] = release_pickle(meta)
    members[f"{FOLDER}/readme.html"] = b"<html></html>"
    return members


def make_archive(members: dict[str, bytes], extra: tarfile.TarInfo | None = None) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        folder = tarfile.TarInfo(FOLDER)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if extra is not None:
            archive.addfile(extra)
    return file.getvalue()


ARCHIVE = make_archive(make_members())
SIZE, SHA256 = len(ARCHIVE), hashlib.sha256(ARCHIVE).hexdigest()
SMALL_RELEASE = [  # settings of a command
    *("data._target_=tests.helpers.cifar10_release.released", "trusted_modules=[tests]"),
    *(f"+data.size={SIZE}", f"+data.sha256={SHA256}"),
]


def released(root: str | Path, *, size: int, sha256: str, **settings: Any) -> DatasetFiles:
    """``cifar10`` as if the release were the archive of this size and checksum."""
    with mock.patch.multiple(download, SIZE=size, SHA256=sha256):
        return cifar10(root, **settings)


@dataclass
class Server:
    """The responses of a loopback server, and the Range header of each request, in order."""

    address: str = ""
    content: bytes = ARCHIVE
    status: int = 200
    stop_after: int | None = None  # bytes of the body, then the connection is closed
    ranges: list[str | None] = field(default_factory=list)
    understands_ranges: bool = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and state.understands_ranges else 0
            if start and start >= len(state.content):
                self.send_error(416)
                return
            self.send_response(206 if start else state.status)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(state.content) - 1}/{len(state.content)}")
            body = state.content[start:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.stop_after])

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.address = f"http://127.0.0.1:{http.server_port}/{cifar10_archive.ARCHIVE_FILE}"
        try:
            yield state
        finally:
            http.shutdown()
            thread.join()
