"""The usual torchvision data path: a Dataset over arrays in memory, transforms v2 and DataLoader."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from workload import MEAN, ON_GPU, STD

from cifar_exp.data.dataset_files import Split

CROP_AND_FLIP = v2.Compose(
    [
        v2.RandomCrop(32, padding=4),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([value / 255 for value in MEAN], [value / 255 for value in STD]),
    ]
)
NORMALIZE = v2.Compose(CROP_AND_FLIP.transforms[2:])


class Images(Dataset[tuple[Tensor, int]]):
    """Images as tensors. No file is read and no PIL image is made, so only transforms and collation are measured."""

    def __init__(self, split: Split, transform: v2.Transform) -> None:
        self.images, self.labels, self.transform = split.images, split.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def loader(split: Split, batch_size: int, *, training: bool, workers: int = 0) -> "DataLoader[Any]":
    """A DataLoader with persistent workers, if there are any."""
    data = Images(split, CROP_AND_FLIP if training else NORMALIZE)
    return DataLoader(
        data,
        batch_size,
        shuffle=training,
        drop_last=training,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=ON_GPU,
    )
