"""The batches of one rank: shuffled, augmented and normalised on the training device.

The order of an epoch is a permutation keyed by (seed, epoch). Step s trains on positions [s * global batch, (s + 1) *
global batch), and rank r takes the r-th slice of them. For a given global batch, the images of a step do not depend on
the number of ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_exp.data.augment import Augmentation
from cifar_exp.data.keyed_rng import keyed_generator
from cifar_exp.data.sources import Source

# The inputs of `make`: what the source fetched, then augmentation parameters (B, K) float32.
MicroBatch = tuple[Tensor, ...]
Batch = tuple[Tensor, Tensor]  # images (B, 3, H, W) float32 channels-last and normalised, labels (B,) int64


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The image at each position of an epoch: a permutation of 0 ... count - 1, (count,) int64."""
    return torch.randperm(count, generator=keyed_generator(seed, "order", epoch))


def shard(count: int, rank: int, world_size: int) -> range:
    """The images that a rank evaluates: a contiguous range without padding. Shard sizes differ by at most one image."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


@dataclass(frozen=True)
class Normalization:
    """``(pixel - shift) * scale`` per channel; pixels and ``shift`` in 0..255.

    It is applied after the augmentation, so the empty border of a translation is black (0) before normalization.
    """

    shift: tuple[float, ...] = (0.0, 0.0, 0.0)
    scale: tuple[float, ...] = (1.0, 1.0, 1.0)

    @classmethod
    def of(cls, kind: str, mean: tuple[float, ...], std: tuple[float, ...]) -> "Normalization":
        """Build the choice of ``train.normalization`` from the training set's statistics (per channel, 0..255)."""
        if kind == "zerocenter":
            return cls(shift=mean)
        if kind == "zscore":
            return cls(shift=mean, scale=tuple(1 / value if value else 1.0 for value in std))  # 0: always the mean
        return cls()

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..255, any type -> float32, channels-last."""
        # In place: a new tensor costs as much as the arithmetic. With a full mean image: broadcasting three channels is
        # not vectorized. 0.4 us per image instead of 5.
        images = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
        images -= constant_images(self.shift, images.shape[2:], images.device)
        if set(self.scale) != {1.0}:
            images *= constant_images(self.scale, images.shape[2:], images.device)
        return images


@lru_cache(maxsize=32)
def constant_images(values: tuple[float, ...], size: Sequence[int], device: torch.device) -> Tensor:
    """(1, 3, H, W) with one value per channel; cached, since CUDA graph capture forbids copies from the host."""
    with torch.inference_mode(mode=False):
        channels = torch.tensor(values, device=device).view(1, -1, 1, 1)
        return channels.expand(1, len(values), *size).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class TrainBatches:
    """One rank's training batches, epoch by epoch.

    Attributes:
        source: returns the training images on the training device.
        augmentation: applied to whole batches on that device.
        normalization: applied after the augmentation.
        seed: seed of image order, augmentation and dropout.
        rank: this rank.
        world_size: number of ranks.
        batch_size: images of a micro-batch on this rank.
        scales: height and width of the images in each epoch, as a share of the full size; empty means full size.
        accumulate: micro-batches per step on this rank. They are the batches that accumulate x world_size ranks would
            get without gradient accumulation.
    """

    source: Source
    augmentation: Augmentation
    normalization: Normalization
    seed: int
    rank: int
    world_size: int
    batch_size: int
    scales: tuple[float, ...] = ()
    accumulate: int = 1

    def dropout_seed(self, epoch: int) -> int:
        """Seed of the network's own random numbers in an epoch, such as dropout; each rank has its own."""
        return keyed_generator(self.seed, "rank", self.rank, epoch).initial_seed()

    @property
    def steps(self) -> int:
        """Steps per epoch; the last, partial global batch is dropped."""
        return len(self.source) // (self.batch_size * self.world_size * self.accumulate)

    def micro_batches(self, epoch: int, done: int = 0) -> Iterator[MicroBatch]:
        """The micro-batches of an epoch (counted from 1), without those of the first ``done`` steps."""
        return self._drawn(epoch, self._parts(range(done, self.steps)))

    def covering(self, epoch: int) -> Iterator[MicroBatch]:
        """The micro-batches of an epoch, and the images that no step takes: all ranks together cover every image once.

        No batch has a single image, since batch norm cannot normalize it.
        """
        count, ranks = len(self.source), self.world_size * self.accumulate
        ends = [*range(self.batch_size, count - 1, self.batch_size), count]
        parts = [slice(place * self.batch_size, end) for place, end in enumerate(ends)]
        mine = [part for place, part in enumerate(parts) if place % ranks // self.accumulate == self.rank]
        return self._drawn(epoch, mine)

    def example(self) -> MicroBatch:
        """The first micro-batch; no other is prefetched, since CUDA graph capture forbids copies."""
        (micro_batch,) = self._drawn(1, self._parts(range(1)))
        return micro_batch

    def _parts(self, steps: range) -> list[slice]:
        """The micro-batches of this rank in ``steps``, as parts of the epoch's order."""
        ranks = self.world_size * self.accumulate  # that would share a step without gradient accumulation
        places = range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate)
        starts = [(step * ranks + rank) * self.batch_size for step in steps for rank in places]
        return [slice(start, start + self.batch_size) for start in starts]

    def _drawn(self, epoch: int, parts: Sequence[slice]) -> Iterator[MicroBatch]:
        order = epoch_order(len(self.source), self.seed, epoch)
        # One copy per epoch: a copy in each step would synchronize with the device.
        parameters = self.augmentation.parameters(order, self.seed, epoch).to(self.source.device)
        for part, draw in zip(parts, self.source.draws(order, parts), strict=True):
            yield *draw, parameters[part]

    def scale(self, epoch: int) -> float:
        """Height and width of the images in an epoch, as a share of the full size."""
        return self.scales[epoch - 1] if self.scales else 1.0

    def make(self, *micro_batch: Tensor, scale: float = 1.0) -> Batch:
        """Gather, augment, normalise and resize the images on the training device. Returns images and labels."""
        *drawn, parameters = micro_batch
        images, labels = self.source.pick(tuple(drawn))
        return resized(self.normalization(self.augmentation(images, parameters)), scale), labels

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch."""
        return (self.make(*micro_batch, scale=self.scale(epoch)) for micro_batch in self.micro_batches(epoch))


def resized(images: Tensor, scale: float) -> Tensor:
    """(B, 3, H, W) float32 -> (B, 3, *scaled_size), bilinear with antialiasing."""
    height, width = images.shape[2:]
    return images if scale == 1 else resized_to(images, scaled_size((height, width), scale))


def resized_to(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, H, W) float32 -> (B, 3, *size), bilinear with antialiasing; as they are where that is their size."""
    return images if images.shape[2:] == size else F.interpolate(images, size, mode="bilinear", antialias=True)


def scaled_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Height and width at ``scale``, in whole pixels."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


EVALUATION_BATCH = 500  # images; large enough to be fast, small enough for any device


@dataclass(frozen=True)
class EvaluationBatches:
    """One rank's share of an evaluation set: each image once, in order, at ``scale`` times its size."""

    source: Source
    normalization: Normalization
    rank: int
    world_size: int
    batch_size: int = EVALUATION_BATCH
    scale: float = 1.0

    def __iter__(self) -> Iterator[Batch]:
        count = len(self.source)
        mine = shard(count, self.rank, self.world_size)
        starts = range(mine.start, mine.stop, self.batch_size)
        parts = [slice(start, min(start + self.batch_size, mine.stop)) for start in starts]
        for draw in self.source.draws(torch.arange(count), parts):
            images, labels = self.source.pick(draw)
            yield resized(self.normalization(images), self.scale), labels
