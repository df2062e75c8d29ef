"""Small shards in both formats, written without the libraries of these formats."""

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

SIDE = 8


class Sample(NamedTuple):
    """An image and its label."""

    png: bytes
    label: int


def samples(count: int, classes: int = 3, first: int = 0) -> list[Sample]:
    """Images that all differ: the red of the first pixel and the green of the second number them."""
    made = []
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        pixels[0, 0] = number % 256, number // 256, 7
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "png")
        made.append(Sample(content.getvalue(), number % classes))
    return made


def number_of(image: Any) -> int:
    """The number of an image (3, H, W) of :func:`samples`."""
    return int(image[0, 0, 0]) + 256 * int(image[1, 0, 0])


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def members_of(part: Sequence[Sample], first: int = 0) -> list[tuple[str, bytes]]:
    """The members of a WebDataset tar."""
    return [
        member
        for number, (png, label) in enumerate(part, first)
        for member in ((f"{number:04d}.cls", b"%d" % label), (f"{number:04d}.png", png))
    ]


def write_webdataset(root: Path, train: Sequence[Sample], test: Sequence[Sample], per_shard: int = 7) -> Path:
    for split, part in (("train", train), ("test", test)):
        for number, start in enumerate(range(0, len(part), per_shard)):
            write_tar(root / split / f"{number:04d}.tar", members_of(part[start : start + per_shard], start))
    return root


def mds_content(part: Sequence[Sample]) -> bytes:
    """An MDS shard with the columns image (bytes), label (int) and name (str)."""
    rows = []
    for number, (png, label) in enumerate(part):
        name = f"image {number}".encode()
        rows.append(np.array([len(png), len(name)], "<u4").tobytes() + png + np.int64(label).tobytes() + name)
    head = 4 + 4 * (len(rows) + 1)
    bounds = np.cumsum([head, *map(len, rows)]).astype("<u4")
    return np.uint32(len(rows)).tobytes() + bounds.tobytes() + b"".join(rows)


def mds_entry(name: str, content: bytes, count: int, packed: bytes | None = None, kind: str = "gz") -> dict[str, Any]:
    """What ``index.json`` says of a shard; ``packed``: its compressed file."""
    data = {"basename": name, "bytes": len(content), "hashes": {}}
    zip_data = None if packed is None else {"basename": f"{name}.{kind}", "bytes": len(packed), "hashes": {}}
    return {
        "column_names": ["image", "label", "name"],
        "column_encodings": ["bytes", "int", "str"],
        "column_sizes": [None, 8, None],
        "compression": None if packed is None else f"{kind}:3",
        "format": "mds",
        "hashes": [],
        "raw_data": data,
        "samples": count,
        "size_limit": 2**20,
        "version": 2,
        "zip_data": zip_data,
    }


def write_mds(root: Path, train: Sequence[Sample], test: Sequence[Sample], per_shard: int = 7) -> Path:
    for split, part in (("train", train), ("test", test)):
        (root / split).mkdir(parents=True)
        entries = []
        for number, start in enumerate(range(0, len(part), per_shard)):
            rows = part[start : start + per_shard]
            content, name = mds_content(rows), f"shard.{number:05d}.mds"
            (root / split / name).write_bytes(content)
            entries.append(mds_entry(name, content, len(rows)))
        (root / split / "index.json").write_text(json.dumps({"shards": entries, "version": 2}))
    return root


@contextmanager
def s3_server(log: Path, port: int = 0) -> Iterator[str]:
    """The address of a real S3-compatible server on loopback, in a process of its own."""
    if not port:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = int(free.getsockname()[1])
    program = (
        f"from moto.server import ThreadedMotoServer as S; import time; S('127.0.0.1', {port}).start(); time.sleep(1e6)"
    )
    with log.open("wb") as output:
        server = subprocess.Popen([sys.executable, "-P", "-c", program], stdout=output, stderr=output, env=os.environ)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5):
                    break
            except OSError:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
