"""The CIFAR-10 archive is downloaded once, always verified, and read without executing or extracting its content."""

import hashlib
import os
import re
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cifar_exp.cli.main import run_command
from cifar_exp.data import cifar10_archive, class_folders
from cifar_exp.data.cifar10 import cifar10
from cifar_exp.data.dataset_files import DatasetFiles
from cifar_exp.errors import ConfigError, DataError, StorageError
from cifar_exp.system import progress_line
from tests.helpers.cifar10_release import (
    ARCHIVE,
    FOLDER,
    LABEL_NAMES,
    SHA256,
    SIZE,
    Server,
    make_archive,
    make_batch,
    make_members,
    release_pickle,
    released,
)
from tests.helpers.defaults import with_defaults

release = partial(released, **with_defaults(cifar10).keywords)
small_cifar10 = partial(release, size=SIZE, sha256=SHA256)


def check_content(files: DatasetFiles) -> None:
    """The arrays are those of the batches, in the batches' order."""
    made = [make_batch(number) for number in range(6)]
    train, test = files.load("train"), files.load("test")
    assert files.classes == tuple(LABEL_NAMES)
    assert (files.train_count, files.test_count, files.image_size) == (100, 20, (32, 32))
    expected = np.concatenate([data for data, _ in made[:5]]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(train.images.numpy(), expected)
    assert train.labels.tolist() == [label for _, labels in made[:5] for label in labels]
    np.testing.assert_array_equal(test.images.numpy(), made[5][0].reshape(-1, 3, 32, 32))
    assert test.labels.tolist() == made[5][1]


def test_a_download_is_verified_decoded_and_not_repeated(tmp_path: Path, server: Server) -> None:
    files = small_cifar10(tmp_path, mirror=server.address)
    check_content(files)
    assert files.content_hash == SHA256
    assert (tmp_path / cifar10_archive.ARCHIVE_FILE).read_bytes() == ARCHIVE
    server.status = 500
    assert small_cifar10(tmp_path, mirror=server.address) == files
    (tmp_path / cifar10_archive.ARCHIVE_FILE).unlink()  # the decoded copy is enough
    assert small_cifar10(tmp_path, mirror=server.address) == files
    assert server.ranges == [None]


def test_a_local_archive_needs_no_network_and_leaves_the_root_alone(tmp_path: Path) -> None:
    archive = tmp_path / "copy.tar.gz"
    archive.write_bytes(ARCHIVE)
    files = small_cifar10(tmp_path / "root", archive=archive, cache=tmp_path / "cache")
    check_content(files)
    assert files.folder == tmp_path / "cache" / SHA256
    assert not (tmp_path / "root").exists()


def test_archive_in_data_root_is_used(tmp_path: Path) -> None:
    (tmp_path / cifar10_archive.ARCHIVE_FILE).write_bytes(ARCHIVE)
    check_content(small_cifar10(tmp_path, mirror="http://127.0.0.1:9/none"))


@pytest.mark.parametrize("wrong", [ARCHIVE[:-1], bytes(len(ARCHIVE))], ids=["short", "other content"])
def test_a_wrong_local_archive_is_refused(tmp_path: Path, wrong: bytes) -> None:
    archive = tmp_path / "copy.tar.gz"
    archive.write_bytes(wrong)
    found = f"{len(wrong):,} bytes" if len(wrong) != SIZE else f"sha256 {hashlib.sha256(wrong).hexdigest()}"
    expected = f"{SIZE:,}" if len(wrong) != SIZE else SHA256
    with pytest.raises(DataError, match=re.escape(f"data.archive={archive}")) as caught:
        small_cifar10(tmp_path / "root", archive=archive)
    assert found in str(caught.value)
    assert f"where {expected}" in str(caught.value)
    archive.rename(tmp_path / cifar10_archive.ARCHIVE_FILE)
    with pytest.raises(DataError, match="Delete it to download it again"):
        small_cifar10(tmp_path)
    assert (tmp_path / cifar10_archive.ARCHIVE_FILE).read_bytes() == wrong  # the user's file is not overwritten


def test_a_missing_local_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.archive=.*nothing\.tar\.gz is not a file"):
        small_cifar10(tmp_path, archive=tmp_path / "nothing.tar.gz")


def check_advice(message: str, address: str) -> None:
    assert address in message
    for text in ("data.mirror=<address>", "data.archive=<file>", "data=folders", "experiment=quickstart"):
        assert text in message


def truncated(server: Server) -> None:
    server.content = ARCHIVE[:500]


def changed(server: Server) -> None:
    server.content = ARCHIVE[:-1] + bytes([ARCHIVE[-1] ^ 1])


def web_page(server: Server) -> None:
    server.content = b"<!DOCTYPE html><title>Please log in</title>"


def absent(server: Server) -> None:
    server.status = 404


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (truncated, f"it has 500 bytes where {SIZE:,} are expected"),
        (changed, f"where {SHA256} is expected"),
        (web_page, "begins with b'<!DOCTYPE html>"),
        (absent, "the server answered 404 Not Found"),
    ],
    ids=["truncated", "changed", "web page", "absent"],  # the archive's hash is another one in each process
)
def test_download_with_wrong_hash_is_refused_and_deleted(
    tmp_path: Path, server: Server, spoil: Callable[[Server], None], found: str
) -> None:
    spoil(server)
    with pytest.raises(DataError) as caught:
        small_cifar10(tmp_path, mirror=server.address)
    assert found in str(caught.value)
    check_advice(str(caught.value), server.address)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_message_without_a_network_names_the_remedy(tmp_path: Path, server: Server) -> None:
    address = "http://127.0.0.1:1/cifar-10-python.tar.gz"
    with pytest.raises(DataError, match="Connection refused") as caught:
        small_cifar10(tmp_path, mirror=address)
    check_advice(str(caught.value), address)
    assert server.ranges == []


@pytest.mark.parametrize("mirror", ["ftp://host/file", "/home/me/cifar-10-python.tar.gz", "file:///etc/passwd"])
def test_mirror_must_be_an_http_address(tmp_path: Path, mirror: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"data.mirror={mirror} must begin with http")):
        small_cifar10(tmp_path, mirror=mirror)


def test_interrupted_download_resumes(tmp_path: Path, server: Server) -> None:
    server.stop_after = 1000
    with pytest.raises(DataError, match=rf"ended after 1,000 of {SIZE:,} bytes.*start again"):
        small_cifar10(tmp_path, mirror=server.address)
    server.stop_after = None
    check_content(small_cifar10(tmp_path, mirror=server.address))
    assert server.ranges == [None, "bytes=1000-"]


@pytest.mark.parametrize("understands_ranges", [True, False])
@pytest.mark.parametrize("kept", [b"another file's beginning", bytes(SIZE - 1), bytes(SIZE), bytes(SIZE + 5)])
def test_wrong_partial_download_is_discarded(
    tmp_path: Path, server: Server, kept: bytes, understands_ranges: bool
) -> None:
    server.understands_ranges = understands_ranges
    (tmp_path / f"{cifar10_archive.ARCHIVE_FILE}.part").write_bytes(kept)
    check_content(small_cifar10(tmp_path, mirror=server.address))
    assert not (tmp_path / f"{cifar10_archive.ARCHIVE_FILE}.part").exists()


def test_partial_download_longer_than_the_mirrors_file_is_discarded(tmp_path: Path, server: Server) -> None:
    web_page(server)
    (tmp_path / f"{cifar10_archive.ARCHIVE_FILE}.part").write_bytes(ARCHIVE[:1000])
    with pytest.raises(DataError, match="a login page"):
        small_cifar10(tmp_path, mirror=server.address)
    assert server.ranges == ["bytes=1000-", None]


def test_a_root_that_cannot_be_written_is_a_storage_error(tmp_path: Path, server: Server) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file.*data\.root=<folder>"):
        small_cifar10(tmp_path / "file", mirror=server.address, cache=tmp_path / "cache")


def test_progress_is_shown_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    for terminal in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal)
        with progress_line.Progress("Reading", 2000, "files") as progress:
            progress.add(1500)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert ("Reading" in captured.err and "1,500 of 2,000 files" in captured.err) == terminal
        assert terminal or captured.err == ""


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../escaped"),
        tarfile.TarInfo("/tmp/cifar-exp-escaped"),
        tarfile.TarInfo(f"{FOLDER}/../../escaped"),
        tarfile.TarInfo(f"{FOLDER}/other"),
        link(f"{FOLDER}/test_batch", "/etc/passwd", tarfile.SYMTYPE),
        link(f"{FOLDER}/test_batch", "../../escaped", tarfile.LNKTYPE),
        link(f"{FOLDER}/test_batch", "", tarfile.FIFOTYPE),
    ],
    ids=lambda member: f"{member.name}-{member.linkname}",
)
def test_members_that_the_release_does_not_have_are_refused(tmp_path: Path, member: tarfile.TarInfo) -> None:
    content = make_archive(make_members(), member)
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / "copy.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(repr(member.name))):
        release(folder, archive=folder / "copy.tar.gz", size=len(content), sha256=hashlib.sha256(content).hexdigest())
    assert not list(tmp_path.rglob("*escaped*"))
    assert not Path("/tmp/cifar-exp-escaped").exists()


class Evil:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    members = make_members()
    members[f"{FOLDER}/data_batch_3"] = release_pickle({b"labels": [], b"data": Evil(tmp_path / "evil")})
    archive = tmp_path / "copy.tar.gz"
    archive.write_bytes(make_archive(members))
    with pytest.raises(DataError, match=r"copy\.tar\.gz is refused: .*posix\.mkdir"):
        cifar10_archive.read_archive(archive)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test_batch", None, "lacks test_batch"),
        ("test_batch", b"no pickle", "damaged batch"),
        ("test_batch", release_pickle([1, 2]), "not a dictionary but list"),
        ("test_batch", release_pickle({b"data": np.zeros((2, 3072), np.uint8)}), "labels"),
        ("test_batch", release_pickle({b"data": np.zeros((2, 9), np.uint8), b"labels": [0, 1]}), "N x 3072"),
        ("test_batch", release_pickle({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}), "uint8"),
        ("data_batch_1", release_pickle({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}), "from 0 to 9"),
        ("batches.meta", release_pickle({}), "label_names"),
    ],
)
def test_batches_of_wrong_shape_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    members = make_members()
    if content is None:
        del members[f"{FOLDER}/{name}"]
    else:
        members[f"{FOLDER}/{name}"] = content
    archive = tmp_path / "copy.tar.gz"
    archive.write_bytes(make_archive(members))
    with pytest.raises(DataError, match=message) as caught:
        cifar10_archive.read_archive(archive)
    assert str(archive) in str(caught.value)


def test_file_that_is_not_a_tar_archive_is_refused(tmp_path: Path) -> None:
    for content in (b"no archive", ARCHIVE[: SIZE // 2]):
        (tmp_path / "copy.tar.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"copy\.tar\.gz cannot be read as a \.tar\.gz"):
            cifar10_archive.read_archive(tmp_path / "copy.tar.gz")


@pytest.fixture
def small_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifar_exp.data.cifar10.cifar10", small_cifar10)


@pytest.mark.usefixtures("small_release")
def test_the_command_writes_lossless_class_folders_once(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tmp_path / "tree"
    arguments = ["data", f"data.root={tmp_path}", f"data.mirror={server.address}", "--to", str(tree)]
    assert run_command(arguments) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cat", "10", "0", "2", "0"] in lines
    assert ["all", "100", "0", "20", "0"] in lines
    assert sorted(path.name for path in (tree / "train" / "ship").iterdir()) == [f"{n:04d}.png" for n in range(1, 11)]
    data, labels = make_batch(5)
    first_ship = data[labels.index(8)].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(Image.open(tree / "test" / "ship" / "0001.png")), first_ship)
    files = with_defaults(class_folders.folders)(tree, cache=tmp_path / "cache")
    assert (files.classes, files.train_count, files.test_count) == (tuple(LABEL_NAMES), 100, 20)

    (tree / "train" / "cat" / "0003.png").unlink()
    (tree / "train" / "cat" / "0004.png").write_bytes(b"mine")
    assert run_command(arguments) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["cat", "1", "9", "0", "2"] in lines
    assert ["all", "1", "99", "0", "20"] in lines
    assert (tree / "train" / "cat" / "0004.png").read_bytes() == b"mine"


@pytest.mark.usefixtures("small_release")
def test_the_command_fails_with_a_message_and_the_errors_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["data", f"data.root={tmp_path}", f"data.archive={tmp_path / 'none.tar.gz'}"]) == 3
    captured = capsys.readouterr()
    assert "none.tar.gz is not a file" in captured.err
    assert "Traceback" not in captured.err
    assert run_command(["data", f"data.root={tmp_path}", "data.mirror=nowhere"]) == 2
    (tmp_path / "file").touch()
    archive = tmp_path / "copy.tar.gz"
    archive.write_bytes(ARCHIVE)
    arguments = ["data", f"data.root={tmp_path}", f"data.archive={archive}", "--to", str(tmp_path / "file")]
    assert run_command(arguments) == 8
    assert "--to=<another folder>" in capsys.readouterr().err
