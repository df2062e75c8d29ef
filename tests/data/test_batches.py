"""The images of a step depend only on seed and epoch; every image is evaluated once; pixels become floats."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_exp.data.augment import Alternating, Augmentation, Crop, Identity, Shift
from cifar_exp.data.batches import Batch, EvaluationBatches, Normalization, TrainBatches, epoch_order, resized, shard
from cifar_exp.data.dataset_files import Split
from tests.helpers.defaults import with_defaults

ALTERNATING, CROP, SHIFT = (with_defaults(kind)() for kind in (Alternating, Crop, Shift))
MEAN, STD = (125.3, 122.95, 113.87), (63.0, 62.1, 66.7)  # CIFAR-10's, about


def random_split(count: int, height: int = 32, width: int = 32) -> Split:
    """Random images. The label of each is its index."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(count))


def epoch_of(
    split: Split, world_size: int, batch_size: int, augmentation: Augmentation, seed: int = 0, epoch: int = 1
) -> list[list[Batch]]:
    """The batches of one epoch, by rank and step."""
    normalization = Normalization(shift=MEAN)
    return [
        list(TrainBatches(split, augmentation, normalization, seed, rank, world_size, batch_size).epoch(epoch))
        for rank in range(world_size)
    ]


def test_epoch_order_is_a_permutation_keyed_by_seed_and_epoch() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    order = epoch_order(1000, seed=3, epoch=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert order.sort().values.tolist() == list(range(1000))
    assert order.dtype == torch.int64
    torch.manual_seed(2)
    assert torch.equal(epoch_order(1000, seed=3, epoch=2), order)
    orders = {tuple(epoch_order(1000, seed, epoch).tolist()) for seed in (3, 4) for epoch in (1, 2, 3)}
    assert len(orders) == 6
    assert (order == torch.arange(1000)).sum() < 10


@pytest.mark.parametrize("augmentation", [SHIFT, CROP, ALTERNATING, Identity()])
def test_one_rank_and_four_see_the_same_pixels_at_every_step(augmentation: Augmentation) -> None:
    """Global batch 16: the ranks' batches of a step, side by side, are the batch of a single rank, bit for bit."""
    split = random_split(70)
    (alone,) = epoch_of(split, 1, 16, augmentation, seed=5, epoch=3)
    four = epoch_of(split, 4, 4, augmentation, seed=5, epoch=3)
    assert len(alone) == 4
    assert {len(steps) for steps in four} == {4}
    for step, (images, labels) in enumerate(alone):
        together_images, together_labels = (torch.cat(part) for part in zip(*(r[step] for r in four), strict=True))
        assert torch.equal(together_labels, labels)
        assert torch.equal(together_images, images)


def test_an_epoch_follows_its_order_and_drops_the_last_partial_global_batch() -> None:
    """37 images, 2 ranks of 4: four steps of 8, the last five left out; each label stays with its image."""
    split = random_split(37)
    ranks = epoch_of(split, 2, 4, Identity(), seed=9, epoch=1)
    seen = torch.cat([ranks[rank][step][1] for step in range(4) for rank in range(2)])
    assert {len(steps) for steps in ranks} == {4}
    assert torch.equal(seen, epoch_order(37, 9, 1)[:32])
    for steps in ranks:
        for images, labels in steps:
            assert torch.equal(images, Normalization(shift=MEAN)(split.images[labels]))


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("count", [36, 37, 38, 41, 47])
def test_covering_batches_take_every_image_once_and_none_alone(count: int, world_size: int, accumulate: int) -> None:
    """Those of the steps first, then the others in batches of the same size; the same ones however many ranks."""
    split, batches = random_split(count), {}
    for rank in range(world_size):
        made = TrainBatches(split, CROP, Normalization(), 9, rank, world_size, 4, accumulate=accumulate)
        own = [made.make(*micro_batch) for micro_batch in made.covering(2)]
        for (images, labels), (trained, _) in zip(own, made.epoch(2), strict=False):
            assert torch.equal(images[:4], trained)
            assert len(labels) in (4, 5)
        batches |= {tuple(labels.tolist()): images for images, labels in own}
    assert sorted(label for labels in batches for label in labels) == list(range(count))
    assert min(map(len, batches)) > 1
    alone = TrainBatches(split, CROP, Normalization(), 9, 0, 1, 4)
    for micro_batch in alone.covering(2):
        images, labels = alone.make(*micro_batch)
        assert torch.equal(batches[tuple(labels.tolist())], images)


def test_an_image_moves_differently_in_each_epoch_and_as_its_parameters_say() -> None:
    split = random_split(24)
    augmentation = CROP
    for epoch in (1, 2):
        (steps,) = epoch_of(split, 1, 8, augmentation, seed=2, epoch=epoch)
        order = epoch_order(24, 2, epoch)
        whole = augmentation(split.images[order], augmentation.parameters(order, 2, epoch))
        assert torch.equal(torch.cat([images for images, _ in steps]), Normalization(shift=MEAN)(whole))
    first, second = (epoch_of(split, 1, 24, SHIFT, epoch=epoch)[0][0] for epoch in (1, 2))
    assert not torch.equal(first[0][first[1].argsort()], second[0][second[1].argsort()])


def test_training_set_of_one_full_batch_drops_no_images() -> None:
    ((only,),) = epoch_of(random_split(8), 1, 8, Identity())
    assert sorted(only[1].tolist()) == list(range(8))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 16, 33, 100, 10_000])
def test_shards_cover_the_set_once_and_differ_by_at_most_one(count: int, world_size: int) -> None:
    shards = [shard(count, rank, world_size) for rank in range(world_size)]
    assert [index for part in shards for index in part] == list(range(count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert all(left.stop == right.start for left, right in pairwise(shards))


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_image_is_evaluated_once_in_order_and_unmoved(world_size: int) -> None:
    split = random_split(33)
    normalization = Normalization(shift=MEAN)
    batches = [
        batch for rank in range(world_size) for batch in EvaluationBatches(split, normalization, rank, world_size, 4)
    ]
    assert max(len(labels) for _, labels in batches) <= 4
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(33))
    assert torch.equal(torch.cat([images for images, _ in batches]), normalization(split.images))


def test_zerocenter_subtracts_the_channel_means() -> None:
    images = torch.tensor([[0, 10, 255], [0, 20, 255], [0, 30, 255]], dtype=torch.uint8).view(1, 3, 1, 3)
    result = Normalization.of("zerocenter", MEAN, STD)(images)
    expected = [[-125.3, -115.3, 129.7], [-122.95, -102.95, 132.05], [-113.87, -83.87, 141.13]]
    torch.testing.assert_close(result.view(3, 3), torch.tensor(expected))


def test_zscore_divides_by_the_deviations_as_well() -> None:
    images = torch.tensor([[0, 255], [0, 255], [0, 255]], dtype=torch.uint8).view(1, 3, 1, 2)
    result = Normalization.of("zscore", MEAN, STD)(images)
    expected = [[-125.3 / 63.0, 129.7 / 63.0], [-122.95 / 62.1, 132.05 / 62.1], [-113.87 / 66.7, 141.13 / 66.7]]
    torch.testing.assert_close(result.view(3, 2), torch.tensor(expected))


def test_zscore_of_a_channel_that_never_changes_is_zero() -> None:
    """A single colour, as in masks: its standard deviation is 0, which must not be a divisor."""
    images = torch.tensor([7, 0, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    result = Normalization.of("zscore", (7.0, 100.0, 205.0), (0.0, 50.0, 25.0))(images)
    assert result.flatten().tolist() == pytest.approx([0, -2, 2])


def test_no_normalization_leaves_the_values() -> None:
    images = random_split(2).images
    assert torch.equal(Normalization.of("none", MEAN, STD)(images), images.float())


@pytest.mark.parametrize("kind", ["zerocenter", "zscore", "none"])
@pytest.mark.parametrize("augmentation", [SHIFT, CROP, Identity()])
def test_batches_are_float32_and_channels_last(kind: str, augmentation: Augmentation) -> None:
    normalization = Normalization.of(kind, MEAN, STD)
    split = random_split(8, 6, 10)
    training = next(TrainBatches(split, augmentation, normalization, 0, 0, 1, 4).epoch(1))
    evaluation = next(iter(EvaluationBatches(split, normalization, 0, 1, 4)))
    for images, labels in (training, evaluation):
        assert images.shape == (4, 3, 6, 10)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.int64


def test_padding_of_a_translation_is_black_and_not_the_mean() -> None:
    split = Split(torch.full((4, 3, 32, 32), 255, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    ((images, _),) = TrainBatches(split, CROP, Normalization(shift=MEAN), 0, 0, 1, 4).epoch(1)
    for channel, mean in enumerate(MEAN):
        values = images[:, channel].unique().tolist()
        assert values == pytest.approx([-mean, 255 - mean], abs=1e-4)


@pytest.mark.parametrize(("scale", "size"), [(0.5, (6, 10)), (0.75, (9, 15)), (0.3, (4, 6))])
def test_smaller_images_are_those_of_pillow(scale: float, size: tuple[int, int]) -> None:
    """Pillow's bilinear filter widens as the image shrinks, so that no pixel is left out."""
    given = torch.randn(4, 3, 12, 20, generator=torch.Generator().manual_seed(0))
    smaller = resized(given.to(memory_format=torch.channels_last), scale)
    assert smaller.shape == (4, 3, *size)
    assert smaller.is_contiguous(memory_format=torch.channels_last)
    for image, result in zip(given.flatten(0, 1), smaller.flatten(0, 1), strict=True):
        expected = Image.fromarray(image.numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
        torch.testing.assert_close(result, torch.from_numpy(np.array(expected)), atol=1e-5, rtol=0)


def test_each_epoch_has_images_of_its_scale_and_of_the_same_pixels() -> None:
    split = random_split(8)
    full, half = (TrainBatches(split, CROP, Normalization(), 0, 0, 1, 4, scales) for scales in ((), (0.5, 1.0)))
    for (whole, labels), (small, same_labels) in zip(full.epoch(1), half.epoch(1), strict=True):
        assert torch.equal(labels, same_labels)
        torch.testing.assert_close(small, resized(whole, 0.5))
    for (whole, _), (other, _) in zip(full.epoch(2), half.epoch(2), strict=True):
        assert torch.equal(whole, other)


def test_evaluation_is_at_the_scale_that_it_is_given() -> None:
    split = random_split(7)
    for (small, labels), (whole, same_labels) in zip(
        EvaluationBatches(split, Normalization(), 0, 1, scale=0.75, batch_size=4),
        EvaluationBatches(split, Normalization(), 0, 1, batch_size=4),
        strict=True,
    ):
        assert small.shape[1:] == (3, 24, 24)
        torch.testing.assert_close(small, resized(whole, 0.75))
        assert torch.equal(labels, same_labels)
