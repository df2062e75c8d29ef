"""Shards of an S3-compatible server on loopback: the images of the folder, whatever is copied; failures are named."""

import os
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_exp.data.image_files import checked_image
from cifar_exp.data.shards import dataset, s3
from cifar_exp.data.shards.places import StoredFile
from cifar_exp.data.shards.s3 import Bucket
from cifar_exp.data.shards.shard_images import ShardFiles
from cifar_exp.data.sources import fetch, open_sources
from cifar_exp.errors import ConfigError, DataError, MachineError
from tests.helpers.defaults import with_defaults
from tests.helpers.image_trees import CPU
from tests.helpers.shard_files import SIDE, s3_server, samples, write_mds, write_webdataset

boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
pytest.importorskip("moto.server", reason="no S3 server: moto[server] is not installed")

shards = with_defaults(dataset.shards)
TRAIN, TEST = samples(61), samples(20, first=61)
SHARD = 2000  # bytes; a shard of seven images has more


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("server") / "log") as address:
        yield address


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a key",
        "AWS_SECRET_ACCESS_KEY": "a secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    s3._client.cache_clear()


@pytest.fixture
def bucket(server: str) -> Iterator[Any]:
    """A client of the server, with a bucket ``images`` of both formats."""
    urllib.request.urlopen(urllib.request.Request(f"{server}/moto-api/reset", method="POST"))
    client = boto3.client("s3", endpoint_url=server)
    client.create_bucket(Bucket="images")
    return client


def upload(client: Any, root: Path, prefix: str) -> None:
    for path in root.rglob("*"):
        if path.is_file() and ".cache" not in path.parts:
            client.upload_file(str(path), "images", f"{prefix}/{path.relative_to(root).as_posix()}")


def uploaded(client: Any, folder: Path, writer: Callable[..., Path] = write_webdataset) -> Path:
    root = writer(folder / "written", TRAIN, TEST)
    upload(client, root, "some/set")
    return root


def from_bucket(server: str, folder: Path, **settings: Any) -> ShardFiles:
    settings = {"image_size": SIDE, "endpoint": server, "cache": folder / "cache", "workers": 0} | settings
    files: ShardFiles = shards("s3://images/some/set", **settings)
    return files


def copied(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "cache" / "shards").iterdir())


@pytest.mark.parametrize("limit", [1.0, 0.00003, 0.0])  # GB: all shards are copied, some, none
@pytest.mark.parametrize("writer", [write_webdataset, write_mds])
def test_images_are_those_of_the_folder_whatever_is_copied(
    bucket: Any, server: str, tmp_path: Path, writer: Callable[..., Path], limit: float
) -> None:
    local = shards(uploaded(bucket, tmp_path, writer), image_size=SIDE)
    files = from_bucket(server, tmp_path, cache_limit=limit, workers=1)
    assert copied(tmp_path) <= limit * 1e9
    assert [shard.copy is not None for shard in files.shards] == sorted(s.copy is not None for s in files.shards)[::-1]
    with open_sources(files, CPU, threads=1) as (train, test):
        for source, split in ((train, local.load("train")), (test, local.load("test"))):
            images, labels = fetch(source, torch.arange(len(split)))
            assert torch.equal(images, split.images)
            assert torch.equal(labels, split.labels)


def test_the_address_of_the_server_may_be_in_the_environment(
    bucket: Any, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded(bucket, tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    assert from_bucket(server, tmp_path, endpoint=None).train_count == 61


def test_a_copy_that_was_removed_is_downloaded_again_and_read_from_the_server_until_then(
    bucket: Any, server: str, tmp_path: Path
) -> None:
    uploaded(bucket, tmp_path)
    files = from_bucket(server, tmp_path)
    before, image = copied(tmp_path), checked_image(files.images("train")[30])
    shutil.rmtree(tmp_path / "cache" / "shards")
    assert torch.equal(checked_image(files.images("train")[30]), image)
    assert from_bucket(server, tmp_path) == files
    assert copied(tmp_path) == before


def test_copies_of_other_shards_are_removed_when_the_limit_needs_it_and_foreign_files_are_not(
    bucket: Any, server: str, tmp_path: Path
) -> None:
    root = uploaded(bucket, tmp_path)
    from_bucket(server, tmp_path)
    before = copied(tmp_path)
    (tmp_path / "cache" / "shards" / "notes.txt").write_text("mine")
    shutil.rmtree(root)
    upload(bucket, write_webdataset(root, samples(61, first=100), TEST), "some/set")
    files = from_bucket(server, tmp_path, cache_limit=before / 1e9)
    names = {path.name for path in (tmp_path / "cache" / "shards").iterdir()}
    assert names == {*(shard.copy.name for shard in files.shards if shard.copy), "notes.txt"}
    assert copied(tmp_path) <= before + 4


def test_a_shard_that_is_changed_or_removed_during_training_is_named(bucket: Any, server: str, tmp_path: Path) -> None:
    uploaded(bucket, tmp_path)
    files = from_bucket(server, tmp_path, cache_limit=0.0)
    bucket.put_object(Bucket="images", Key="some/set/train/0000.tar", Body=b"x" * 20_000)
    bucket.delete_object(Bucket="images", Key="some/set/train/0001.tar")
    train = files.images("train")
    assert "s3://images/some/set: train/0000.tar: it was changed while it was read" in str(train[0])
    assert "train/0001.tar: it was removed while it was read" in str(train[7])


def test_missing_buckets_shards_and_wrong_credentials_are_named(bucket: Any, server: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train/ has no shards"):
        from_bucket(server, tmp_path)
    with pytest.raises(DataError, match=r"s3://other: .* there is no such bucket .* data.endpoint="):
        shards("s3://other", image_size=SIDE, endpoint=server, cache=tmp_path)
    uploaded(bucket, tmp_path)
    checks_credentials(server, after="0")
    try:
        with pytest.raises(DataError, match=r"access is denied. Set AWS_ACCESS_KEY_ID and") as refused:
            from_bucket(server, tmp_path)
        assert "a secret" not in str(refused.value)
    finally:
        checks_credentials(server, after="inf")


def checks_credentials(server: str, after: str) -> None:
    """Let the server check credentials after that many requests."""
    header = {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(f"{server}/moto-api/reset-auth", after.encode(), header))


def test_a_server_that_does_not_answer_is_named(bucket: Any, server: str, tmp_path: Path) -> None:
    uploaded(bucket, tmp_path)
    files = from_bucket(server, tmp_path, cache_limit=0.0)
    with pytest.raises(DataError, match=r"the server http://127.0.0.1:9 does not answer .* resume="):
        from_bucket("http://127.0.0.1:9", tmp_path)
    assert files.images("train")[0] is not None


@pytest.mark.parametrize(
    ("address", "endpoint", "match"),
    [
        ("s3://", None, r"must be s3://<bucket>/<prefix>"),
        ("https://key:secret@images/set", None, r"a folder or s3://<bucket>/<prefix>"),
        ("s3://key:secret@images/set", None, r"without a password"),
        ("s3://images/set", "http://key:secret@host", r"data.endpoint must be an address without a password"),
        ("s3://images/set", "file:///etc", r"data.endpoint must be an address"),
    ],
)
def test_addresses_of_other_forms_are_refused_without_repeating_them(
    tmp_path: Path, address: str, endpoint: str | None, match: str
) -> None:
    with pytest.raises(ConfigError, match=match) as refused:
        shards(address, image_size=SIDE, endpoint=endpoint, cache=tmp_path)
    assert "key:secret" not in str(refused.value)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    with pytest.raises(MachineError, match=r"pip install 'cifar-exp\[shards\]'"):
        shards("s3://images/set", image_size=SIDE, cache=tmp_path)


class _Broken:
    """A connection that breaks after a few bytes, twice without any."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def get_object(self, Range: str, **_: Any) -> dict[str, Any]:  # noqa: N803
        self.asked.append(Range)
        return {"Body": self}

    def iter_chunks(self, _size: int) -> Iterator[bytes]:
        from botocore.exceptions import IncompleteReadError

        first, last = map(int, self.asked[-1].removeprefix("bytes=").split("-"))
        if len(self.asked) not in (2, 3):
            yield bytes(range(first, min(first + 4, last + 1)))
        if first + 4 <= last or len(self.asked) in (2, 3):
            raise IncompleteReadError(actual_bytes=4, expected_bytes=10)


def test_a_connection_that_breaks_is_followed_by_another_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = _Broken()
    monkeypatch.setattr(s3, "_client", lambda *_: broken)
    assert Bucket("b", "", None).part(StoredFile("x", 99, "v"), 10, 10) == bytes(range(10, 20))
    assert broken.asked == ["bytes=10-19", "bytes=14-19", "bytes=14-19", "bytes=14-19", "bytes=18-19"]


def test_no_key_of_a_bucket_is_a_path(bucket: Any, server: str, tmp_path: Path) -> None:
    root = write_webdataset(tmp_path / "written", TRAIN, TEST)
    upload(bucket, root, "some/set")
    bucket.upload_file(str(root / "train" / "0000.tar"), "images", "some/set/train/../../../out.tar")
    bucket.upload_file(str(root / "train" / "0000.tar"), "images", "some/set/train//tmp/out.tar")
    assert from_bucket(server, tmp_path).train_count == 61
    assert not list(tmp_path.rglob("out.tar"))
    assert {os.path.splitext(path)[1] for path in (tmp_path / "cache" / "shards").iterdir()} == {".shard"}  # noqa: PTH122
