"""A trained network that labels image files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar_exp.config.stored import stored_config
from cifar_exp.data.batches import Normalization, resized_to
from cifar_exp.data.image_reader import Preprocessing, read_image
from cifar_exp.data.image_tree import SkippedFiles, images_below
from cifar_exp.errors import ConfigError, DataError, StorageError
from cifar_exp.records import checkpoint
from cifar_exp.records.run_folder import CONFIG_FILE
from cifar_exp.runs.config_changes import UNREADABLE
from cifar_exp.runs.foreign_network import network_of, within_available_memory
from cifar_exp.runs.user_code import refusing
from cifar_exp.system.printable import print_notice, printable


@dataclass(frozen=True)
class Classifier:
    """A trained network with its normalization, image size and class names."""

    model: nn.Module
    classes: Sequence[str]
    normalization: Normalization
    preprocessing: Preprocessing
    image_size: tuple[int, int]  # of the network's input

    @classmethod
    def of_run(cls, run_dir: Path, which: str = "", trusted: Sequence[str] = ()) -> "Classifier":
        """The network of the run in ``run_dir``.

        Args:
            run_dir: the run's folder. It may be untrusted: ``trusted_modules`` in its config.yaml is ignored.
            which: ``best`` or ``last``; empty: the best checkpoint if there is one, else the last.
            trusted: modules outside this package, torch and torchvision whose code may run.

        Raises:
            ConfigError: the best checkpoint is requested, but the run has none.
            StorageError: the folder has no readable checkpoint.
        """
        saved = None if which == "last" else checkpoint.best(run_dir, print_notice)
        if saved is None and which == "best":
            raise ConfigError(
                f"checkpoint=best: {run_dir} has no best checkpoint without data.validation. Set checkpoint=last"
            )
        saved = saved or checkpoint.newest(run_dir, print_notice)
        section = _model_section(run_dir / CONFIG_FILE)
        model = network_of(section, saved.model, len(saved.classes), trusted)
        rule = Preprocessing.of(saved.preprocessing, saved.image_size)
        return cls(model, saved.classes, Normalization(saved.shift, saved.scale), rule, saved.image_size)

    def probabilities(self, images: Tensor) -> Tensor:
        """``images``: (N, 3, H, W) uint8 -> (N, classes) float32, each row adding up to 1."""
        with torch.inference_mode():
            logits: Tensor = self.model(resized_to(self.normalization(images), self.image_size))
            return logits.float().softmax(1)

    @property
    def batch(self) -> int:
        """The batch size, in images: about 50 MB of pixels."""
        height, width = self.preprocessing.image_size
        return max(1, min(500, 50_000_000 // (3 * height * width)))

    def label(self, images: Sequence[Tensor]) -> list[tuple[str, float]]:
        """``images``: as returned by :meth:`read` -> the label of each and its probability."""
        with within_available_memory(), refusing("model: it cannot label images", (), "Choose another run"):
            best = self.probabilities(torch.stack(list(images))).max(1)
        if unknown := int((~best.values.isfinite()).sum()):
            raise ConfigError(
                f"model: its outputs for {unknown} of {len(images)} images are no finite numbers, so the weights or "
                f"the normalization of this checkpoint are useless. Choose another run"
            )
        names = [self.classes[index] for index in best.indices.tolist()]
        return list(zip(names, best.values.tolist(), strict=True))

    def read(self, path: Path) -> Tensor:
        """Read an image file as (3, H, W) uint8, preprocessed like the training images.

        Raises:
            DataError: the file is not a readable image.
        """
        image = read_image(path, self.preprocessing)
        if isinstance(image, str):
            where = printable(path)
            raise DataError(f"{where}: the image cannot be read: {image.removeprefix(f'{where}: ')}")
        return image


def _model_section(path: Path) -> dict[str, Any]:
    """The section ``model`` of a run's configuration.

    Raises:
        StorageError: the configuration is missing or cannot be read.
    """
    try:
        return dict(stored_config(path)["model"])
    except UNREADABLE as error:
        raise StorageError(f"{path}: the run's configuration cannot be read: {error}. Restore that file") from error


def images_in(paths: Sequence[str]) -> tuple[list[Path], str]:
    """The files in ``paths`` and the image files in the folders in ``paths``. Also a count of the other files in these
    folders.

    Raises:
        DataError: a path does not exist or a folder holds no image.
    """
    files: list[Path] = []
    skipped = SkippedFiles()
    for path in map(Path, paths):
        try:
            found = [path / image.path for image in images_below(path, skipped)] if path.is_dir() else [path]
        except OSError as error:
            raise DataError(f"{printable(path)}: the folder cannot be read: {error.strerror}") from error
        if not found or not (path.is_dir() or path.is_file()):
            raise DataError(
                f"{printable(path)}: there is no image here. Give the path of an image or of a folder of images"
            )
        files += found
    return files, skipped.line()
