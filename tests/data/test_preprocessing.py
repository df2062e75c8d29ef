"""Prediction preprocesses images like training and evaluation, for every format and residency."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cifar_exp.data import class_folders
from cifar_exp.data.batches import EvaluationBatches, Normalization
from cifar_exp.data.image_reader import MAX_BYTES, MAX_PIXELS, Preprocessing, decode_image, read_image
from cifar_exp.errors import DataError, StorageError
from cifar_exp.records import journal
from cifar_exp.runs.classifier import Classifier, images_in
from tests.conftest import TINY, Command
from tests.helpers.defaults import with_defaults

SIDE = 16
PERIODS = {"coarse": 8, "fine": 3}
SHAPES = {"square": (SIDE, SIDE), "wide": (SIDE, 3 * SIDE), "tall": (3 * SIDE, SIDE), "small": (9, 12)}
KINDS = ("square", "wide", "tall", "small", "L", "RGBA", "P", "CMYK", "16", *(f"exif{turn}" for turn in range(2, 9)))
ORIENTATION = 0x0112
# What undoes each EXIF orientation; the image is saved so that turning it as EXIF says gives what was drawn.
UNDONE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def stripes(rng: np.random.Generator, kind: str, upright: bool, period: int) -> Image.Image:
    """Upright or level stripes: turned, squashed or clipped they are those of another class, or none."""
    height, width = SHAPES.get(kind, SHAPES["wide"])
    pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    across = np.arange(width)[None, :] if upright else np.arange(height)[:, None]
    pixels += ((2 * (across + rng.integers(period)) // period) % 2 * 120).astype(np.uint8)[..., None]
    return Image.fromarray(pixels)


def save(image: Image.Image, kind: str, path: Path) -> None:
    if kind == "16":
        grey = np.asarray(image.convert("L")).astype(np.uint16)
        Image.fromarray(grey * 257).save(path.with_suffix(".png"))
    elif kind == "CMYK":
        image.convert("CMYK").save(path.with_suffix(".tif"))
    elif kind.startswith("exif"):
        turn = int(kind.removeprefix("exif"))
        exif = Image.Exif()
        exif[ORIENTATION] = turn
        suffix = {2: ".png", 3: ".webp"}.get(turn, ".jpg")
        image.transpose(UNDONE[turn]).save(path.with_suffix(suffix), exif=exif, quality=95)
    else:
        (image if kind in SHAPES else image.convert(kind)).save(path.with_suffix(".png"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes with images of every kind."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 5), ("test", 2)):
        for name, period in PERIODS.items():
            for way in ("level", "upright"):
                folder = root / split / f"{name}-{way}"
                folder.mkdir(parents=True)
                for kind in KINDS:
                    for number in range(count):
                        save(stripes(rng, kind, way == "upright", period), kind, folder / f"{kind}-{number}")
    return root


def test_prediction_has_the_runs_test_accuracy(cifar_exp: Command, workplace: Path, pictures: Path) -> None:
    options = ["data=folders", f"data.root={pictures}", f"data.cache={workplace}/cache", f"data.image_size={SIDE}"]
    recipe = ["train.batch_size=16", "train.epochs=4", "model.width=8", "model.depth=1", "augment=none",
              "optimizer=adamw", "optimizer.lr=0.01", "train.lr_scaling=none", "train.precision=fp32"]  # fmt: skip
    small = [word for word in TINY if not word.startswith(("data", "train", "model"))]
    done = cifar_exp("-m", "data.residency=device,host,loader", *small, *options, *recipe, "tracking=none")
    assert done.returncode == 0, done.stderr
    runs = sorted(path.parent for path in (workplace / "outputs" / "multirun").rglob("metrics.jsonl"))
    assert len(runs) == 3
    paths, skipped = images_in([str(pictures / "test")])
    assert (len(paths), skipped) == (8 * len(KINDS), "")
    for run in runs:
        classifier = Classifier.of_run(run)
        labels = classifier.label([classifier.read(path) for path in paths])
        right = sum(label == path.parent.name for path, (label, _) in zip(paths, labels, strict=True))
        expected = journal.last_values(run)["test/accuracy"]
        assert right / len(paths) == pytest.approx(expected, abs=1e-9)
        assert expected > 0.9


@pytest.fixture(scope="module")
def loaded(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    cache = tmp_path_factory.mktemp("cache")
    return {
        residency: with_defaults(class_folders.folders)(pictures, cache=cache, residency=residency, image_size=SIDE)
        for residency in ("device", "host", "loader")
    }


def test_images_are_the_same_bit_for_bit_in_every_residency_and_for_prediction(
    pictures: Path, loaded: dict[Any, Any]
) -> None:
    rule = Preprocessing((SIDE, SIDE))
    read = [read_image(path, rule) for path in images_in([str(pictures / "test")])[0]]
    for files in loaded.values():
        assert torch.equal(files.load("test").images, torch.stack(read))  # type: ignore[arg-type]
        assert files.preprocessing == rule
    assert loaded["device"].mean == pytest.approx(loaded["loader"].mean)


@pytest.mark.parametrize("turn", UNDONE)
def test_the_exif_orientation_is_applied(tmp_path: Path, turn: int) -> None:
    drawn = Image.fromarray(np.random.default_rng(turn).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    for suffix in (".png", ".tif"):
        path = tmp_path / f"turned{suffix}"
        drawn.transpose(UNDONE[turn]).save(path, exif=exif)
        np.testing.assert_array_equal(decode_image(path), np.asarray(drawn).transpose(2, 0, 1))
    plain = decode_image(tmp_path / "turned.png", turned=False)
    np.testing.assert_array_equal(plain, np.asarray(drawn.transpose(UNDONE[turn])).transpose(2, 0, 1))


@pytest.mark.parametrize(
    "damage", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12"]
)
def test_damaged_exif_data_rotate_nothing(tmp_path: Path, damage: bytes) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(drawn).save(tmp_path / "x.png", exif=damage)
    np.testing.assert_array_equal(decode_image(tmp_path / "x.png"), drawn.transpose(2, 0, 1))


def test_a_run_that_ends_on_smaller_images_predicts_on_smaller_images(loaded: dict[Any, Any]) -> None:
    """``train.image_scales``: evaluation resizes what was read, and so does prediction."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    normalization = Normalization((120.0, 121.0, 122.0), (0.01, 0.02, 0.03))
    split = loaded["device"].load("test")
    ((evaluated, _),) = EvaluationBatches(split, normalization, 0, 1, scale=0.5)
    classifier = Classifier(network, "abcd", normalization, Preprocessing((SIDE, SIDE)), (8, 8))
    with torch.inference_mode():
        assert torch.equal(classifier.probabilities(split.images), network(evaluated).softmax(1))


def test_preprocessing_survives_storage_and_unknown_rules_are_refused() -> None:
    rule = Preprocessing((12, 34))
    assert Preprocessing.of(rule.stored(), (1, 1)) == rule
    assert Preprocessing.of(None, (12, 34)) == Preprocessing((12, 34), turned=False)
    sizes = ([0, 5], [10**5, 10**5], [math.inf, 5], [math.nan, 5], [5.0, 5], ["5", "5"], [True, 5], [5], 5, "55")
    for change in ({"resize": "squash"}, {"orientation": "up"}, *({"image_size": size} for size in sizes)):
        with pytest.raises(StorageError, match=r"preprocessing .* is unknown to this version\. Update"):
            Preprocessing.of(rule.stored() | change, (12, 34))


def test_images_that_exhaust_memory_or_start_a_program_are_refused(tmp_path: Path) -> None:
    rule = Preprocessing((SIDE, SIDE))
    Image.new("1", (MAX_PIXELS // 2, 1)).save(tmp_path / "thin.png")  # resized, it would cover 16 x 500,000,000 pixels
    assert "too long and narrow" in str(read_image(tmp_path / "thin.png", rule))
    (tmp_path / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n")
    assert str(read_image(tmp_path / "program.png", rule)).endswith("program.png: is not an image in a known format")


@pytest.mark.parametrize("kind", ["webp", "ppm", "png", "tiff"])
def test_a_file_far_larger_than_any_image_is_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"sparse.{kind}"
    Image.new("RGB", (4, 4)).save(path)
    if kind == "ppm":
        path.write_bytes(b"P6\n#")  # a comment without an end
    assert (kind == "ppm") == isinstance(decode_image(path), str)
    os.truncate(path, MAX_BYTES + 1)
    assert decode_image(path) == "has 536,870,913 bytes, more than 536,870,912"


@pytest.mark.filterwarnings("error")
def test_a_single_pixel_is_an_image(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "pixel.png")
    image = read_image(tmp_path / "pixel.png", Preprocessing((2, 2)))
    assert isinstance(image, torch.Tensor)
    assert image[:, 1, 1].tolist() == [1, 2, 3]


def test_prediction_skips_the_files_that_training_skips(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a.png", "below/b.PNG", "._a.png", ".hidden/h.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        stripes(rng, "square", True, 3).save(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    paths, skipped = images_in([str(tmp_path)])
    assert paths == [tmp_path / "a.png", tmp_path / "below" / "b.PNG"]
    assert skipped == "2 hidden, 1 of other kinds (.txt)"
    assert images_in([str(tmp_path / "._a.png")]) == ([tmp_path / "._a.png"], "")  # it is named
    with pytest.raises(DataError, match=r"n\\nowhere: there is no image here"):
        images_in([str(tmp_path / "n\nowhere")])
