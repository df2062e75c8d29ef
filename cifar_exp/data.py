"""From images on disk to the batches of one rank.

Training order is a permutation keyed by (seed, epoch). Step s takes positions [s * global batch, (s + 1) * global
batch), rank r the r-th slice of them: which images a step sees does not depend on how many ranks share it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cifar_exp.array_cache import Split
from cifar_exp.augment import Augmentation
from cifar_exp.rng import keyed_generator

Draw = tuple[Tensor, Tensor]  # indices of images (B,) int64, augmentation parameters (B, K) float32
Batch = tuple[Tensor, Tensor]  # images (B, 3, H, W) float32 channels-last and normalised, labels (B,) int64


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The image at each position of an epoch: a permutation of 0 ... count - 1, (count,) int64."""
    return torch.randperm(count, generator=keyed_generator(seed, "order", epoch))


def shard(count: int, rank: int, world_size: int) -> range:
    """The images that a rank evaluates: unpadded and contiguous, at most one more than another rank's."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


@dataclass(frozen=True)
class Normalization:
    """``(pixel - shift) * scale`` per channel; pixels and ``shift`` in 0..255.

    It follows the augmentation, so that what a translation uncovers is black, not the mean.
    """

    shift: tuple[float, ...] = (0.0, 0.0, 0.0)
    scale: tuple[float, ...] = (1.0, 1.0, 1.0)

    @classmethod
    def of(cls, kind: str, mean: tuple[float, ...], std: tuple[float, ...]) -> "Normalization":
        """The choice of ``train.normalization`` with the training set's figures (per channel, 0..255)."""
        if kind == "zerocenter":
            return cls(shift=mean)
        if kind == "zscore":
            return cls(shift=mean, scale=tuple(1 / value if value else 1.0 for value in std))  # 0: always the mean
        return cls()

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..255, any type -> float32, channels-last."""
        # Whole images of the mean, and in place: three channels to broadcast over defeat vectors, new memory costs as
        # much as the arithmetic. 0.4 us an image instead of 5.
        layout = torch.channels_last
        images = images.to(torch.float32, memory_format=layout, copy=True)
        shape = images.shape[1:]
        images -= images.new_tensor(self.shift).view(1, -1, 1, 1).expand(1, *shape).contiguous(memory_format=layout)
        if set(self.scale) != {1.0}:
            images *= images.new_tensor(self.scale).view(1, -1, 1, 1).expand(1, *shape).contiguous(memory_format=layout)
        return images


@dataclass(frozen=True)
class TrainBatches:
    """One rank's training batches, epoch by epoch.

    Attributes:
        split: all training images, on the training device.
        augmentation: applied to whole batches on that device.
        normalization: applied after it.
        seed: of order and augmentation.
        rank: this rank.
        world_size: number of ranks.
        batch_size: images of this rank a step.
        scales: side of the images in each epoch, as a share of their own; none: full size.
    """

    split: Split
    augmentation: Augmentation
    normalization: Normalization
    seed: int
    rank: int
    world_size: int
    batch_size: int
    scales: tuple[float, ...] = ()

    def noise_seed(self, epoch: int) -> int:
        """Seed of what the network itself draws in an epoch, as dropout does; each rank has its own."""
        return keyed_generator(self.seed, "rank", self.rank, epoch).initial_seed()

    def draws(self, epoch: int) -> Iterator[Draw]:
        """What each step of an epoch (counted from 1) trains on; the last partial global batch is dropped."""
        order = epoch_order(len(self.split.labels), self.seed, epoch)
        device = self.split.images.device
        # A whole epoch's rows go to the device at once: a copy a step would make the host wait.
        parameters = self.augmentation.parameters(order, self.seed, epoch).to(device)
        order = order.to(device)
        global_batch = self.batch_size * self.world_size
        for start in range(0, len(order) - global_batch + 1, global_batch):
            mine = slice(start + self.rank * self.batch_size, start + (self.rank + 1) * self.batch_size)
            yield order[mine], parameters[mine]

    def scale(self, epoch: int) -> float:
        """Side of the images in an epoch, as a share of their own."""
        return self.scales[epoch - 1] if self.scales else 1.0

    def make(self, indices: Tensor, parameters: Tensor, scale: float = 1.0) -> Batch:
        """The batch of a draw: gathered, augmented, normalised and resized on the training device."""
        rows = self.split.images.permute(0, 2, 3, 1).index_select(0, indices)  # whole images in one piece
        augmented = self.augmentation(rows.permute(0, 3, 1, 2), parameters)
        return resized(self.normalization(augmented), scale), self.split.labels[indices]

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch."""
        return (self.make(*draw, self.scale(epoch)) for draw in self.draws(epoch))


def resized(images: Tensor, scale: float) -> Tensor:
    """(B, 3, H, W) float32 -> (B, 3, H * scale, W * scale), as :func:`scaled`; bilinear with antialiasing."""
    if scale == 1:
        return images
    height, width = images.shape[2:]
    return F.interpolate(images, scaled((height, width), scale), mode="bilinear", antialias=True)


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Height and width at ``scale``, in whole pixels."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


EVALUATION_BATCH = 500  # images; large enough to be fast, small enough for any device


@dataclass(frozen=True)
class EvaluationBatches:
    """One rank's share of a set that is evaluated, each image once, in order, at ``scale`` of its size."""

    split: Split
    normalization: Normalization
    rank: int
    world_size: int
    batch_size: int = EVALUATION_BATCH
    scale: float = 1.0

    def __iter__(self) -> Iterator[Batch]:
        mine = shard(len(self.split.labels), self.rank, self.world_size)
        for start in range(mine.start, mine.stop, self.batch_size):
            part = slice(start, min(start + self.batch_size, mine.stop))
            yield resized(self.normalization(self.split.images[part]), self.scale), self.split.labels[part]
