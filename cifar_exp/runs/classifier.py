"""A trained network that labels image files."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar_exp.config.stored import stored_config
from cifar_exp.data.batches import Normalization
from cifar_exp.data.image_files import IMAGE_SUFFIXES, read_image
from cifar_exp.errors import ConfigError, DataError, StorageError
from cifar_exp.records import checkpoint
from cifar_exp.records.run_folder import CONFIG_FILE
from cifar_exp.runs.components import model_factory
from cifar_exp.runs.config_changes import UNREADABLE


@dataclass(frozen=True)
class Classifier:
    """A trained network with what turns an image into its input and its output into a name."""

    model: nn.Module
    classes: Sequence[str]
    normalization: Normalization
    image_size: tuple[int, int]

    @classmethod
    def of_run(cls, run_dir: Path, which: str = "", trusted: Sequence[str] = ()) -> "Classifier":
        """The network of the run in ``run_dir``.

        Args:
            run_dir: the run's folder. It may come from anybody: what its configuration trusts is not believed.
            which: ``best``, ``last``, or neither for the best one where one is kept.
            trusted: modules beside this package, torch and torchvision whose code may be run.

        Raises:
            ConfigError: the best one is wanted and none is kept.
            StorageError: where it holds no readable checkpoint.
        """

        def warn(line: str) -> None:
            print(f"cifar-exp: {line}", file=sys.stderr)

        saved = None if which == "last" else checkpoint.best(run_dir, warn)
        if saved is None and which == "best":
            raise ConfigError(
                f"checkpoint=best: {run_dir} was trained without data.validation and keeps none. Set checkpoint=last"
            )
        saved = saved or checkpoint.newest(run_dir, warn)
        section = _model_section(run_dir / CONFIG_FILE)
        model = model_factory(section, trusted)(num_classes=len(saved.classes))
        model.load_state_dict(saved.model)
        return cls(model.eval(), saved.classes, Normalization(saved.shift, saved.scale), saved.image_size)

    def probabilities(self, images: Tensor) -> Tensor:
        """``images``: (N, 3, H, W) uint8 -> (N, classes) float32, each row adding up to 1."""
        with torch.inference_mode():
            logits: Tensor = self.model(self.normalization(images))
            return logits.float().softmax(1)

    def label(self, images: Sequence[Tensor]) -> list[tuple[str, float]]:
        """``images``: each as :meth:`read` returns it -> for each its label and the label's probability."""
        best = self.probabilities(torch.stack(list(images))).max(1)
        names = [self.classes[index] for index in best.indices.tolist()]
        return list(zip(names, best.values.tolist(), strict=True))

    def read(self, path: Path) -> Tensor:
        """An image file as (3, H, W) uint8 of the training images' size.

        Raises:
            DataError: where it is no readable image.
        """
        image = read_image(path, self.image_size)
        if isinstance(image, str):
            raise DataError(f"{path}: the image cannot be read: {image.removeprefix(f'{path}: ')}")
        return image


def _model_section(path: Path) -> dict[str, Any]:
    """``model`` of a run's configuration.

    Raises:
        StorageError: where there is none that can be read.
    """
    try:
        return dict(stored_config(path)["model"])
    except UNREADABLE as error:
        raise StorageError(f"{path}: the run's configuration cannot be read: {error}. Restore that file") from error


def images_in(paths: Sequence[str]) -> list[Path]:
    """The image files among ``paths`` and in the folders among them.

    Raises:
        DataError: where a path does not exist or a folder holds no image.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise DataError(f"{path}: there is no image here. Give the path of an image or of a folder of images")
        files += found
    return files
