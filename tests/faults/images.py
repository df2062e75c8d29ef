"""Images and archives that are missing, damaged, of other formats, or malicious."""

import gzip
import hashlib
import os
import pickle
import re
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tests.faults.registry import case
from tests.faults.runs import UNTRACKED, statuses
from tests.faults.scene import Ended, Scene, check_exit
from tests.helpers.checkpoints import Malicious
from tests.helpers.cifar10_release import (
    ARCHIVE,
    FOLDER,
    SMALL_RELEASE,
    make_archive,
    make_batch,
    make_members,
    release_pickle,
)

SMALL = (
    *("train.batch_size=2", "train.epochs=1", "model.width=4", "model.depth=1", "train.precision=fp32"),
    *("devices=cpu", "devices.count=1", "progress=quiet"),
)


def picture(mode: str = "RGB", size: int = 32) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def tree(root: Path) -> Path:
    """Class folders with intact images."""
    for split, count in (("train", 4), ("test", 2)):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                picture().save(root / split / name / f"{number}.png")
    return root


def truncated(root: Path) -> None:
    path = root / "train/bee/1.png"
    path.write_bytes(path.read_bytes()[:400])


def bomb(root: Path) -> None:
    """Make a header claim 60,000 x 60,000 pixels."""
    path = root / "train/ant/0.png"
    content = bytearray(path.read_bytes())
    content[16:24] = (60000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def without(folder: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        for path in sorted((root / folder).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()

    return damage


def remove(folder: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        without(folder)(root)
        (root / folder).rmdir()

    return damage


def extra(folder: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / folder).mkdir()
        picture().save(root / folder / "0.png")

    return damage


def save(name: str, image: Image.Image) -> Callable[[Path], None]:
    return lambda root: image.save(root / name)


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        (root / name).write_bytes(content)

    return damage


TREES: dict[str, tuple[Callable[[Path], None], int, tuple[str, ...]]] = {
    "a truncated image": (truncated, 3, ("train/bee/1.png", "Replace or delete")),
    "an empty image file": (write("test/ant/1.png", b""), 3, ("test/ant/1.png", "is empty")),
    "text named .png": (write("train/ant/2.png", b"<html>404</html>"), 3, ("train/ant/2.png", "not an image")),
    "an image that claims billions of pixels": (bomb, 3, ("train/ant/0.png", "60000")),
    "an image of another size": (save("train/ant/3.png", picture(size=31)), 3, ("3.png", "31 x 31", "Resize")),
    "an image of floating-point numbers": (save("train/ant/3.tif", Image.new("F", (32, 32))), 3, ("3.tif", "floating")),
    "a 16-bit image": (save("train/ant/3.png", Image.new("I;16", (32, 32))), 0, ()),
    "no such folder": (lambda root: root.rename(root.with_name("elsewhere")), 3, ("there is no folder",)),
    "no training folder": (remove("train"), 3, ("there is no folder", "train")),
    "a missing class folder": (remove("test/bee"), 3, ("Missing", "test/bee")),
    "an extra class folder": (extra("test/cow"), 3, ("Missing", "train/cow")),
    "an empty class folder": (without("train/bee"), 3, ("train/bee", "has no images")),
    "no class folders": (lambda root: [without(split)(root) for split in ("train", "test")], 3, ("class folders",)),
    "a broken link": (lambda root: (root / "train/ant/9.png").symlink_to("nowhere"), 0, ()),
    "a CMYK image": (lambda root: [picture("CMYK").save(root / "train/ant/9.jpg")], 0, ()),
    "a class folder whose name is not UTF-8": (
        lambda root: [os.rename(os.fsencode(root / split / "bee"), os.fsencode(root / split) + b"/b\xffe")  # noqa: PTH104
                      for split in ("train", "test")], 0, ()),
}  # fmt: skip


@case(*TREES)
def broken_trees(scene: Scene) -> None:
    """A sweep over all of them: each job names its own fault. Once repaired, all are trained."""
    for number, (damage, _, _) in enumerate(TREES.values()):
        damage(tree(scene.folder / f"tree-{number}"))
    roots = ",".join(f"tree-{number}" for number in range(len(TREES)))
    sweep = ("-m", *SMALL, "data=folders", f"data.root={roots}")
    ended = scene.run(*sweep)
    check_exit(ended, 3)
    check_jobs(ended, [(code, words) for _, code, words in TREES.values()])
    codes = [code for _, code, _ in TREES.values()]
    assert sorted(statuses(scene)) == ["FAILED"] + ["FINISHED"] * codes.count(0), "a refused job leaves no run"
    for number, code in enumerate(codes):
        if code:
            root = scene.folder / f"tree-{number}"
            if root.exists():
                root.rename(root.with_name(f"broken-{number}"))
            tree(root)
    again = scene.run(*sweep, "resume=auto")
    check_exit(again, 0)
    assert statuses(scene) == ["FINISHED"] * (len(TREES) + 1), statuses(scene)
    for fault, (_, code, _) in TREES.items():
        scene.handled(fault, "trains once it is repaired" if code else "none needed: it trains")


def check_jobs(ended: Ended, expected: list[tuple[int, tuple[str, ...]]]) -> None:
    """Check the failure message of each job of a sweep, or that it did not fail."""
    messages = dict(re.findall(r"cifar-exp: job (\d+) failed: (.*?)(?=cifar-exp: job|\Z)", ended.err, re.DOTALL))
    for number, (code, words) in enumerate(expected):
        message = messages.get(str(number), "")
        assert bool(message) == bool(code), f"job {number} says {message!r}"
        for word in words:
            assert word in message, f"no {word!r} in what job {number} says: {message}"


def malicious_member(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def with_batch(content: bytes) -> bytes:
    return make_archive(make_members() | {f"{FOLDER}/data_batch_3": content})


def without_batch() -> bytes:
    members = make_members()
    del members[f"{FOLDER}/data_batch_4"]
    return make_archive(members)


def swollen() -> bytes:
    """A member whose header claims 10 GB, without content. ``TarFile`` refuses to write one."""
    member = tarfile.TarInfo(f"{FOLDER}/data_batch_9")
    member.size = 10 * 2**30
    return gzip.compress(member.tobuf() + bytes(2 * tarfile.BLOCKSIZE))


def wrong_labels() -> bytes:
    data, _ = make_batch(3)
    return with_batch(release_pickle({b"labels": [99] * 20, b"data": data}))


def archives(marker: Path) -> dict[str, tuple[bytes, bool, tuple[str, ...]]]:
    """Content, whether the expected sha256 is that of this content, and words of the message."""
    flipped = ARCHIVE[:1000] + bytes([ARCHIVE[1000] ^ 1]) + ARCHIVE[1001:]
    escape = malicious_member("../../escaped", tarfile.REGTYPE)
    link = malicious_member(f"{FOLDER}/test_batch", tarfile.SYMTYPE, "/etc/passwd")
    device = malicious_member(f"{FOLDER}/data_batch_1", tarfile.CHRTYPE)
    return {
        "a truncated archive": (ARCHIVE[: len(ARCHIVE) // 2], False, ("bytes where",)),
        "an archive with a flipped bit": (flipped, False, ("sha256",)),
        "a web page in place of the archive": (b"<!doctype html><title>Log in</title>", False, ("bytes where",)),
        "an empty archive": (b"", False, ("bytes where",)),
        "an archive that is not a .tar.gz": (b"PK\3\4" * 100, True, ("cannot be read as a .tar.gz",)),
        "a member with .. in its path": (make_archive(make_members(), escape), True, ("../../escaped",)),
        "a link in the archive": (make_archive(make_members(), link), True, ("a link to /etc/passwd",)),
        "a device in the archive": (make_archive(make_members(), device), True, ("data_batch_1",)),
        "a member of 10 GB": (swollen(), True, ("10,737,418,240 bytes",)),
        "a missing batch": (without_batch(), True, ("lacks data_batch_4",)),
        "a malicious pickle in the archive": (
            with_batch(pickled(marker)),
            True,
            ("posix.mkdir", "not allowed"),
        ),
        "a damaged pickle in the archive": (with_batch(b"\x80\x02}q"), True, ("damaged batch",)),
        "labels out of range": (wrong_labels(), True, ("labels must be",)),
    }


def pickled(marker: Path) -> bytes:
    return pickle.dumps(Malicious(marker))


ARCHIVES = archives(Path("executed"))


@case(*ARCHIVES)
def broken_archives(scene: Scene) -> None:
    """A sweep over all of them: none is extracted or executed, and the intact one trains."""
    marker = scene.folder / "executed"
    choices = scene.folder / "mine" / "data"
    choices.mkdir(parents=True)
    cases = archives(marker)
    for number, (content, taken, _) in enumerate(cases.values()):
        path = scene.folder / f"{number}.tar.gz"
        path.write_bytes(content)
        release = content if taken else ARCHIVE
        (choices / f"archive{number}.yaml").write_text(yaml.safe_dump(choice(release, archive=path.name)))
    (scene.folder / "sound.tar.gz").write_bytes(ARCHIVE)
    (choices / "sound.yaml").write_text(yaml.safe_dump(choice(ARCHIVE, archive="sound.tar.gz")))
    names = ",".join([*(f"archive{number}" for number in range(len(cases))), "sound"])
    ended = scene.run("-m", "--config-dir", "mine", "trusted_modules=[tests]", f"data={names}", *SMALL)
    check_exit(ended, 3)
    check_jobs(ended, [*((3, words) for _, _, words in cases.values()), (0, ())])
    assert statuses(scene) == ["FAILED", "FINISHED"], "the sweep and the intact one: a refused job has no run"
    assert not marker.exists(), "code in an archive was run"
    escaped = [path for path in (scene.folder / "escaped", scene.base / "escaped") if path.exists()]
    assert not escaped, "a member climbed out of the archive"
    for fault in cases:
        scene.handled(fault, "the same; an intact archive trains")


def choice(release: bytes, **settings: Any) -> dict[str, Any]:
    """A data YAML that expects the size and sha256 of ``release``."""
    known = {"size": len(release), "sha256": hashlib.sha256(release).hexdigest()}
    root = f"cifar-{hashlib.sha256(repr((settings, known)).encode()).hexdigest()[:8]}"
    mine = {"_target_": "tests.helpers.cifar10_release.released", "root": root, **known, **settings}
    return {"defaults": ["cifar10", "_self_"], **mine}


@contextmanager
def web_server(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """Serve ``answer`` on loopback; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
        finally:
            server.shutdown()
            thread.join()


def send(handler: BaseHTTPRequestHandler, content: bytes, status: int = 200, cut: int | None = None) -> None:
    start = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
    handler.send_response(206 if start else status)
    if start:
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    handler.send_header("Content-Length", str(len(content) - start))
    handler.end_headers()
    handler.wfile.write(content[start:][:cut])


SERVERS = ("a login page from the mirror", "a mirror that answers 404", "a mirror that breaks off",
           "a mirror that cannot be reached")  # fmt: skip


@case(*SERVERS)
def broken_mirrors(scene: Scene) -> None:
    base = (*SMALL, *SMALL_RELEASE, *UNTRACKED)
    env = {"no_proxy": "127.0.0.1"}

    def train(address: str) -> Ended:
        return scene.run(*base, f"data.mirror={address}", env=env)

    with web_server(lambda handler: send(handler, b"<html>Log in</html>")) as address:
        check_exit(train(address), 3, "a login page", "data.mirror=<address>")
    scene.handled(SERVERS[0], "the same")
    with web_server(lambda handler: handler.send_error(404)) as address:
        check_exit(train(address), 3, "404", "data.mirror=<address>")
    scene.handled(SERVERS[1], "the same")
    check_exit(train(address), 3, "cannot be downloaded", "data.archive=<file>")
    scene.handled(SERVERS[3], "the same")
    with web_server(lambda handler: send(handler, ARCHIVE, cut=len(ARCHIVE) // 2)) as address:
        check_exit(train(address), 3, f"ended after {len(ARCHIVE) // 2:,} of {len(ARCHIVE):,} bytes", "start again")
    with web_server(lambda handler: send(handler, ARCHIVE)) as address:
        check_exit(train(address), 0)
    scene.handled(SERVERS[2], "fetches the rest and trains")


@case("SIGKILL while images are decoded", racy=True, needs=("linux",))
def killed_while_decoding(scene: Scene) -> None:
    """An unfinished cache is never used, and is removed."""
    root = scene.folder / "pictures"
    for split, count in (("train", 300), ("test", 20)):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                picture().save(root / split / name / f"{number}.png")
    sweep = (*SMALL, *UNTRACKED, "data=folders", "data.root=pictures", "train.batch_size=64")
    for number in range(scene.times):
        cache = f"cache-{number}"
        running = scene.start(*sweep, f"data.cache={cache}")
        running.until((scene.folder / cache / ".lock").exists, "the decoding")
        time.sleep(scene.random.uniform(0, 0.3))
        running.process.kill()
        running.wait()
        check_exit(scene.run(*sweep, f"data.cache={cache}"), 0)
        assert not list((scene.folder / cache).glob("unfinished-*"))
        scene.handled("SIGKILL while images are decoded", "decodes them again")
