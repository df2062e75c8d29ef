"""Shards: every image once an epoch, the same batches as from memory, resumed anywhere; damaged shards are named."""

import bz2
import gzip
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cifar_exp.data.augment import Identity
from cifar_exp.data.batches import EvaluationBatches, Normalization, TrainBatches
from cifar_exp.data.image_reader import decode_image
from cifar_exp.data.shards import dataset, listing, store
from cifar_exp.data.shards.mds_index import PixelImage
from cifar_exp.data.shards.tar_index import index_tar
from cifar_exp.data.sources import Source, fetch, open_sources
from cifar_exp.data.validation_split import hold_out, split_source
from cifar_exp.errors import ConfigError, DataError
from tests.conftest import TINY, Command
from tests.helpers.defaults import with_defaults
from tests.helpers.image_trees import CPU
from tests.helpers.shard_files import (
    SIDE,
    Sample,
    mds_content,
    mds_entry,
    members_of,
    number_of,
    samples,
    write_mds,
    write_tar,
    write_webdataset,
)

shards = with_defaults(dataset.shards)
TRAIN, TEST = samples(61), samples(20, first=61)
WRITERS = [write_webdataset, write_mds]


@pytest.fixture(scope="module", params=WRITERS, ids=["webdataset", "mds"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = request.param(tmp_path_factory.mktemp("written"), TRAIN, TEST)
    return root


def seen(images: torch.Tensor) -> list[int]:
    return [number_of(image) for image in images.round().int()]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_image_is_seen_once_over_ranks_and_workers(written: Path, world_size: int, workers: int) -> None:
    files = shards(written, image_size=SIDE, workers=workers)
    trained, tested = Counter[int](), Counter[int]()
    for rank in range(world_size):
        with open_sources(files, CPU, threads=1) as (train, test):
            batches = TrainBatches(train, Identity(), Normalization(), 3, rank, world_size, 2)
            for micro_batch in batches.covering(epoch=1):
                images, labels = batches.make(*micro_batch)
                assert [number % 3 for number in seen(images)] == labels.tolist()
                trained.update(seen(images))
            for images, _ in EvaluationBatches(test, Normalization(), rank, world_size):
                tested.update(seen(images))
    assert trained == Counter(range(61))
    assert tested == Counter(range(61, 81))


@pytest.mark.parametrize("writer", WRITERS)
def test_batches_are_those_of_images_in_memory_also_from_the_midst_of_an_epoch(
    tmp_path: Path, writer: Callable[..., Path]
) -> None:
    files = shards(writer(tmp_path, TRAIN, TEST), image_size=SIDE, workers=2)
    with open_sources(files, CPU, threads=1) as (train, _):
        ours, theirs = (
            TrainBatches(source, Identity(), Normalization(), 5, 1, 2, 4) for source in (train, files.load("train"))
        )
        for done in (0, 3):
            pairs = zip(ours.micro_batches(2, done), theirs.micro_batches(2, done), strict=True)
            for our, their in pairs:
                (our_images, our_labels), (their_images, their_labels) = ours.make(*our), theirs.make(*their)
                assert torch.equal(our_images, their_images)
                assert torch.equal(our_labels, their_labels)
        order = [seen(ours.make(*micro_batch)[0]) for micro_batch in ours.micro_batches(2)]
        other = TrainBatches(train, Identity(), Normalization(), 6, 1, 2, 4)
        assert [seen(other.make(*micro_batch)[0]) for micro_batch in other.micro_batches(2)] != order


def test_both_formats_are_one_data_set(tmp_path: Path) -> None:
    first, second = (
        shards(writer(tmp_path / str(i), TRAIN, TEST), image_size=SIDE) for i, writer in enumerate(WRITERS)
    )
    assert (first.classes, first.mean, first.std) == (second.classes, second.mean, second.std)
    assert torch.equal(first.load("train").images, second.load("train").images)
    assert first.content_hash != second.content_hash


def test_the_validation_split_is_held_out_as_in_other_data_sets(tmp_path: Path) -> None:
    files = hold_out(shards(write_webdataset(tmp_path, TRAIN, TEST), image_size=SIDE, workers=0), 0.2)
    with open_sources(files, CPU, threads=1) as (source, _):
        train, held_out = split_source(source, files)
        assert held_out is not None
        assert (len(train), len(held_out)) == (49, 12)
        assert sorted(chain(numbers(train), numbers(held_out))) == list(range(61))


def numbers(source: Source) -> list[int]:
    return seen(fetch(source, torch.arange(len(source)))[0])


def test_a_second_start_reads_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shards(write_webdataset(tmp_path, TRAIN, TEST), image_size=SIDE)
    monkeypatch.setattr(store.Store, "prepare", None)
    assert shards(tmp_path, image_size=SIDE) == first


def test_only_a_changed_shard_is_indexed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shards(write_webdataset(tmp_path, TRAIN, TEST), image_size=SIDE)
    write_tar(tmp_path / "train" / "0002.tar", members_of(samples(3, first=300)))
    read: list[str] = []
    monkeypatch.setattr(listing, "index_tar", lambda path, columns: read.append(path.name) or index_tar(path, columns))
    second = shards(tmp_path, image_size=SIDE)
    assert read == ["0002.tar"]
    assert second.train_count == first.train_count - 4
    assert second.content_hash != first.content_hash


def test_an_index_that_was_damaged_is_made_again(tmp_path: Path) -> None:
    first = shards(write_webdataset(tmp_path, TRAIN, TEST), image_size=SIDE)
    for path in (tmp_path / ".cache").rglob("*.np[yz]"):
        path.write_bytes(path.read_bytes()[:-9])
    assert shards(tmp_path, image_size=SIDE) == first
    assert shards(tmp_path, image_size=SIDE).load("test").labels.tolist() == [number % 3 for number in range(61, 81)]


def test_class_names_are_read_from_a_file(tmp_path: Path) -> None:
    write_webdataset(tmp_path, TRAIN, TEST)
    assert shards(tmp_path, image_size=SIDE).classes == ("0", "1", "2")
    (tmp_path / "classnames.txt").write_text("ant\nbee\ncrab\ndove\n")
    assert shards(tmp_path, image_size=SIDE).classes == ("ant", "bee", "crab", "dove")


@pytest.mark.parametrize("kind", ["gz", "bz2", "zstd"])
def test_compressed_mds_shards_are_read_from_copies_and_their_hashes_are_checked(tmp_path: Path, kind: str) -> None:
    if kind == "zstd":
        zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    write_mds(tmp_path, TRAIN, TEST)
    content = mds_content(TRAIN[:7])
    packed = {"gz": gzip.compress, "bz2": bz2.compress}.get(kind) or zstandard.ZstdCompressor().compress
    entry = mds_entry("shard.00000.mds", content, 7, packed(content), kind)
    (tmp_path / "train" / f"shard.00000.mds.{kind}").write_bytes(packed(content))
    (tmp_path / "train" / "shard.00000.mds").unlink()
    index = tmp_path / "train" / "index.json"
    others = json.loads(index.read_text())["shards"][1:]

    def with_hash(value: str) -> None:
        entry["zip_data"]["hashes"] = {"sha1": value, "unknown64": "0"}
        index.write_text(json.dumps({"shards": [entry, *others]}))

    with_hash("0" * 40)
    with pytest.raises(DataError, match=r"train/shard.00000.mds.\w+ is damaged: its sha1"):
        shards(tmp_path, image_size=SIDE)
    with_hash(hashlib.sha1(packed(content)).hexdigest())
    assert numbers(shards(tmp_path, image_size=SIDE).load("train")) == list(range(61))
    with pytest.raises(ConfigError, match=r"data.cache_limit=0: .* Set data.cache_limit=1 "):
        shards(tmp_path, image_size=SIDE, cache_limit=0)


def test_raw_pixels_of_pillow_are_read_and_bounded() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    content = np.array([4, 2, 3], "<u4").tobytes() + b"RGB" + pixels.tobytes()
    assert np.array_equal(decode_image(PixelImage("a", content)), pixels.transpose(2, 0, 1))
    huge = np.array([2**31, 2**31, 3], "<u4").tobytes() + b"RGB"
    assert "2147483648 x 2147483648 pixels" in str(decode_image(PixelImage("a", huge)))
    assert isinstance(decode_image(PixelImage("a", content[:-1])), str)


# What is wrong, and what the message says.


def refused(root: Path, match: str, error: type[Exception] = DataError, **settings: Any) -> None:
    with pytest.raises(error, match=match):
        shards(root, image_size=SIDE, **settings)


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Set data.image_size="):
        shards(tmp_path, image_size=None)
    refused(tmp_path, "there is no folder .*train")
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    refused(tmp_path, r"train/ has no shards. Expected: train/\*.tar")
    (tmp_path / "train" / "a.tar.gz").write_bytes(b"")
    refused(tmp_path, "decompress them")
    write_webdataset(tmp_path, TRAIN, TEST)
    refused(tmp_path, "has no index.json", format="mds")
    refused(tmp_path, r"no image with a label \(81 samples without an image", image="jpg")
    (tmp_path / "train" / "index.json").write_text("{}")
    refused(tmp_path, "has both index.json and tar files")
    assert shards(tmp_path, image_size=SIDE, format="webdataset").train_count == 61


PNG = TRAIN[0].png
BAD_TARS: dict[str, tuple[Sequence[tuple[str, bytes]], str]] = {
    "a label that is no number": ([("a.png", PNG), ("a.cls", b"cat\x1b[2J")], r"label 'cat\\x1b\[2J' in a.cls"),
    "a negative label": ([("a.png", PNG), ("a.cls", b"-1")], "has the label -1; labels are whole numbers from 0"),
    "a label out of range": ([("a.png", PNG), ("a.cls", b"9")], "of the label 9 and none of the label 3"),
    "a JSON label that is text": ([("a.png", PNG), ("a.json", b'{"label": "cat"}')], "label='cat' in a.json"),
    "JSON that is none": ([("a.png", PNG), ("a.json", b"[" * 9999)], "a.json that is no JSON object"),
    "two images": ([("a.png", PNG), ("a.bmp", PNG), ("a.cls", b"0")], "several images .* Set data.image=png"),
    "one name twice": ([("a.png", PNG), ("a.png", PNG)], "has two members a.png"),
    "an image that is none": ([("a.png", b"no image"), ("a.cls", b"0")], "is not an image in a known format"),
}


@pytest.mark.parametrize("case", BAD_TARS)
def test_a_bad_sample_of_a_tar_is_named(tmp_path: Path, case: str) -> None:
    members, match = BAD_TARS[case]
    write_webdataset(tmp_path, TRAIN, TEST)
    write_tar(tmp_path / "train" / "bad.tar", members)
    refused(tmp_path, match)


def test_a_label_of_a_test_image_that_training_lacks_is_named(tmp_path: Path) -> None:
    write_webdataset(tmp_path, TRAIN, [*TEST, Sample(PNG, 3)])
    refused(tmp_path, r"test/0002.tar has the label 3, but the training images have the labels 0 to 2")


def whole_tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, part in members_of(TRAIN[:3]):
            info = tarfile.TarInfo(name)
            info.size = len(part)
            archive.addfile(info, io.BytesIO(part))
    return content.getvalue()


def negative_size(content: bytes) -> bytes:
    header = bytearray(content[:512])
    header[124:136] = b"\xff" * 8 + (-1024).to_bytes(4, "big", signed=True)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
    return bytes(header) + content[512:]


def huge_header(content: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**32
    return info.tobuf(tarfile.USTAR_FORMAT) + content


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "is no sound tar file"),
    "no tar": (lambda _: b"x" * 5000, "is no sound tar file"),
    "cut in a member": (lambda content: content[:1100], "is cut or damaged at byte 1,024"),
    "cut between members": (lambda content: content[:2048], "is cut or damaged at byte 2,048"),
    "a damaged header": (lambda content: content[:1024] + b"\1" * 512 + content[1536:], "damaged at byte 1,024"),
    "joined": (lambda content: content + content, "continues after its end marker"),
    "a negative size": (negative_size, "header|sound tar"),
    "a header of 4 GiB": (huge_header, "has a header of 4,294,967,296 bytes"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_tar_is_named(tmp_path: Path, case: str) -> None:
    change, match = DAMAGE[case]
    write_webdataset(tmp_path, TRAIN, TEST)
    (tmp_path / "train" / "0001.tar").write_bytes(change(whole_tar()))
    refused(tmp_path, f"the shard train/0001.tar .*({match})")


def test_links_names_of_other_folders_and_hidden_members_of_a_tar_are_only_counted(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("1")
    write_webdataset(tmp_path, TRAIN, TEST)
    with tarfile.open(tmp_path / "train" / "odd.tar", "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "a.cls"), (tarfile.LNKTYPE, "b.cls"), (tarfile.CHRTYPE, "c.cls")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
        for name, content in (
            *(("../../out.png", PNG), ("../../out.cls", b"0"), ("/tmp/out.png", PNG), ("._x.png", PNG)),
            *(("lone.png", PNG), ("dir/more.txt", b"text")),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    files = shards(tmp_path, image_size=SIDE)
    assert files.train_count == 62  # with ../../out.png, whose name is only a key
    assert files.skipped == (
        "1 hidden, 3 links or special members, 2 samples without a label, 1 sample without an image"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache", "secret", "test", "train"]


def changed_index(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        change(index["shards"][1])
        (folder / "index.json").write_text(json.dumps(index))

    return apply


def changed_shard(change: Callable[[bytearray], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = bytearray((folder / "shard.00001.mds").read_bytes())
        change(content)
        (folder / "shard.00001.mds").write_bytes(content)

    return apply


def word(place: int, value: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        content[place : place + 4] = value.to_bytes(4, "little")

    return change


BAD_MDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a missing shard": (lambda folder: (folder / "shard.00001.mds").unlink(), "shard.00001.mds, .* is missing"),
    "a cut shard": (lambda folder: os.truncate(folder / "shard.00001.mds", 99), "has 99 bytes, and index.json says"),
    "another folder's file": (
        changed_index(lambda entry: entry["raw_data"].update(basename="../../secret")),
        r"\.\./\.\./secret, .* is missing",
    ),
    "pickles": (
        changed_index(lambda entry: entry.update(column_encodings=["pkl", "int", "str"])),
        r"no columns that can be the image .*image \(pkl\)",
    ),
    "no number for a label": (
        changed_index(lambda entry: entry.update(column_encodings=["bytes", "pkl", "str"])),
        r"no columns that can be the label",
    ),
    "another format": (changed_index(lambda entry: entry.update(format="json")), "format 'json'; only 'mds'"),
    "no index": (lambda folder: (folder / "index.json").write_text("[]").__str__(), "is not an index of MDS"),
    "a size of another type": (changed_index(lambda entry: entry.update(samples="7")), "is not an index of MDS"),
    "a column of another size": (
        changed_index(lambda entry: entry.update(column_sizes=[None, 4, None])),
        "columns do not fill them",
    ),
    "a negative size": (changed_index(lambda entry: entry.update(column_sizes=[None, -8, 8])), "MDS|fill"),
    "another count": (changed_index(lambda entry: entry.update(samples=6)), "has 7 samples, and index.json says 6"),
    "offsets beyond the end": (changed_shard(word(4 * 8, 2**31)), "has damaged offsets"),
    "falling offsets": (changed_shard(word(4 * 3, 40)), "has damaged offsets"),
    "an image beyond its sample": (changed_shard(word(36, 2**30)), "columns do not fill them"),
    "a shard twice": (
        changed_index(lambda entry: entry["raw_data"].update(basename="shard.00000.mds", bytes=0)),
        "says 0|twice",
    ),
}


@pytest.mark.parametrize("case", BAD_MDS)
def test_bad_mds_is_named(tmp_path: Path, case: str) -> None:
    change, match = BAD_MDS[case]
    write_mds(tmp_path, TRAIN, TEST)
    change(tmp_path / "train")
    refused(tmp_path, match)


def test_columns_of_mds_are_chosen_by_kind_then_by_name_then_by_setting(tmp_path: Path) -> None:
    write_mds(tmp_path, TRAIN, TEST)
    for split in ("train", "test"):
        path = tmp_path / split / "index.json"
        path.write_text(path.read_text().replace('"label", "name"', '"y", "other"').replace('"str"', '"bytes"'))
    assert shards(tmp_path, image_size=SIDE).train_count == 61  # of two columns of bytes, the one called image
    refused(tmp_path, "no columns that can be the label .* Set data.label=<column>", label="z")
    refused(tmp_path, "is not an image", image="other")


def test_a_shard_that_is_cut_during_training_is_named(tmp_path: Path) -> None:
    files = shards(write_webdataset(tmp_path, TRAIN, TEST), image_size=SIDE, workers=1)
    for path in (tmp_path / "train").glob("*.tar"):
        os.truncate(path, 512)
    with (
        open_sources(files, CPU, threads=1) as (train, _),
        pytest.raises(DataError, match=r"image at byte [\d,]+: the shard is cut or was changed since the start"),
    ):
        fetch(train, torch.arange(5))


RUN = [
    *("data=shards", "data.root=images", f"data.image_size={SIDE}", "data.workers=2", "progress=quiet"),
    *("devices.count=2", "train.batch_size=8", "train.precision=fp32"),
]


def test_two_ranks_train_on_shards_as_on_class_folders(cifar_exp: Command, workplace: Path) -> None:
    write_webdataset(workplace / "images", ordered(TRAIN), ordered(TEST))
    for split, part in (("train", TRAIN), ("test", TEST)):
        for number, sample in enumerate(part):
            path = workplace / "tree" / split / str(sample.label) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(sample.png)
    tiny = [setting for setting in TINY if not setting.startswith("data")]
    for name, data in (("shards", []), ("folders", ["data=folders", "data.root=tree", "data.residency=loader"])):
        done = cifar_exp(*tiny, *RUN, *data, f"hydra.run.dir={name}", "tracking=none")
        assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(workplace / name / "model.safetensors") for name in ("shards", "folders"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    metrics = [
        json.loads(line)["metrics"] for line in (workplace / "shards" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [values["test/count"] for values in metrics if "test/count" in values] == [20]


def ordered(part: Sequence[Sample]) -> list[Sample]:
    """By class, as class folders are listed."""
    return sorted(part, key=lambda sample: sample.label)
