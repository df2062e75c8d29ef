"""Shards: every image once an epoch, the same batches as from memory, resumed anywhere; damaged shards are named."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from cifar_exp.data.augment import Identity
from cifar_exp.data.batches import EvaluationBatches, Normalization, TrainBatches
from cifar_exp.data.shards import dataset
from cifar_exp.data.sources import open_sources
from tests.helpers.defaults import with_defaults
from tests.helpers.image_trees import CPU
from tests.helpers.shard_files import SIDE, number_of, samples, write_mds, write_webdataset

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
