"""Training images that are kept apart to validate on, so that the test set is evaluated once, at the end.

Which ones depends on the labels and on their number, not on the seed: repeats over seeds and the jobs of a sweep are
judged by the same images, and a run that starts from another one's checkpoint finds them as unseen as they were there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cifar_exp.data.dataset_files import DatasetFiles
from cifar_exp.data.keyed_rng import keyed_generator
from cifar_exp.data.sources import Source
from cifar_exp.errors import ConfigError


def keep_apart(files: DatasetFiles, share: float) -> DatasetFiles:
    """The same dataset with a ``share`` (0 to 1) of its training images kept apart.

    Raises:
        ConfigError: where that is no image, or all of them.
    """
    count = round(share * files.train_count)
    if share and not 0 < count < files.train_count:
        usual = 0.1 if round(0.1 * files.train_count) else 0
        raise ConfigError(
            f"data.validation={share}: it keeps {count} of {files.train_count} training images apart, but at least one "
            f"must be left to train on and one to validate on. Type data.validation={usual}"
        )
    return replace(files, train_count=files.train_count - count, validation_count=count)


def divided(source: Source, files: DatasetFiles) -> tuple[Source, Source | None]:
    """All training images as those to train on and those kept apart, None where there are none; nothing is copied."""
    if not files.validation_count:
        return source, None
    rest, kept = division(files.labels("train"), files.validation_count)
    return Subset(source, rest), Subset(source, kept)


def division(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The places of the images to train on and of the ``count`` kept apart, (N,) int64, ascending.

    Images are drawn at random, and of each class its share, to within one.
    """
    shuffled = torch.randperm(len(labels), generator=keyed_generator("validation"))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    # At even distances over the classes side by side, in whole numbers: exactly `count` in all.
    reached = torch.arange(len(labels) + 1) * count // len(labels)
    kept = reached[1:] > reached[:-1]
    return by_class[~kept].sort().values, by_class[kept].sort().values


@dataclass(frozen=True)
class Subset:
    """Some images of a source, as a source.

    Attributes:
        source: all of them.
        places: (N,) int64, on the host, where in ``source`` each image is.
    """

    source: Source
    places: Tensor

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def image_size(self) -> tuple[int, int]:
        return self.source.image_size

    def __len__(self) -> int:
        return len(self.places)

    def draws(self, order: Tensor, parts: Sequence[slice]) -> Iterator[tuple[Tensor, ...]]:
        return self.source.draws(self.places[order], parts)

    def pick(self, draw: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return self.source.pick(draw)
