"""The validation split: training images that are held out, so that the test set is evaluated once, at the end.

The split depends on the labels and the number of held-out images, not on the seed. So repeats over seeds and the jobs
of a sweep are validated on the same images. A run that starts from another run's checkpoint has not trained on them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cifar_exp.data.dataset_files import DatasetFiles
from cifar_exp.data.keyed_rng import keyed_generator
from cifar_exp.data.sources import ForwardingSource, Source
from cifar_exp.errors import ConfigError


def hold_out(files: DatasetFiles, share: float) -> DatasetFiles:
    """The same dataset with a ``share`` (0 to 1) of its training images held out.

    Raises:
        ConfigError: the share amounts to no image or to all images.
    """
    count = round(share * files.train_count)
    if share and not 0 < count < files.train_count:
        usual = 0.1 if round(0.1 * files.train_count) else 0
        raise ConfigError(
            f"data.validation={share}: it holds out {count} of {files.train_count} training images, but at least one "
            f"must be left to train on and one to validate on. Set data.validation={usual}"
        )
    return replace(files, train_count=files.train_count - count, validation_count=count)


def split_source(source: Source, files: DatasetFiles) -> tuple[Source, Source | None]:
    """The training images without the validation split, and the validation split or None. Nothing is copied."""
    if not files.validation_count:
        return source, None
    training, held_out = split_indices(files.labels("train"), files.validation_count)
    return Subset(source, training), Subset(source, held_out)


def split_indices(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices of the images to train on and of the ``count`` held-out ones, (N,) int64, ascending.

    The split is random and stratified: each class has its share to within one image.
    """
    shuffled = torch.randperm(len(labels), generator=keyed_generator("validation"))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    # Take every (N / count)-th image of the class-sorted list. Integer arithmetic gives exactly `count` images.
    reached = torch.arange(len(labels) + 1) * count // len(labels)
    held_out = reached[1:] > reached[:-1]
    return by_class[~held_out].sort().values, by_class[held_out].sort().values


@dataclass(frozen=True)
class Subset(ForwardingSource):
    """Some images of a source, as a source.

    Attributes:
        places: (N,) int64, on the host: the index of each image in ``source``.
    """

    places: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def draws(self, order: Tensor, parts: Sequence[slice]) -> Iterator[tuple[Tensor, ...]]:
        return self.source.draws(self.places[order], parts)
