"""`cifar-exp predict`: label images with the network of a run."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from cifar_exp.cli.words import settings_in
from cifar_exp.data.batches import Normalization
from cifar_exp.data.image_files import IMAGE_SUFFIXES, read_image
from cifar_exp.errors import ConfigError, DataError, StorageError
from cifar_exp.records import checkpoint
from cifar_exp.records.find_run import find_run
from cifar_exp.records.run_folder import CONFIG_FILE
from cifar_exp.runs.components import model_factory
from cifar_exp.runs.config_changes import UNREADABLE
from cifar_exp.system.surroundings import settle


@dataclass(frozen=True)
class Classifier:
    """A trained network with its preprocessing and class names.

    Attributes:
        model: the network in evaluation mode.
        classes: the class names, in the order of the logits.
        normalization: maps uint8 images to the network's input.
        image_size: height and width of the input in pixels.
    """

    model: nn.Module
    classes: Sequence[str]
    normalization: Normalization
    image_size: tuple[int, int]

    @classmethod
    def of_run(cls, run_dir: Path, which: str = "", trusted: Sequence[str] = ()) -> "Classifier":
        """Load the network of the run in ``run_dir``.

        Args:
            run_dir: the run folder. It may be untrusted: ``trusted_modules`` of its configuration is ignored.
            which: ``best``, ``last``, or empty for the best checkpoint if there is one, else the last.
            trusted: modules outside this package, torch and torchvision whose code may run.

        Raises:
            ConfigError: ``which`` is ``best`` and the run has no best checkpoint.
            StorageError: the run has no readable checkpoint.
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
        """Class probabilities of a batch.

        Args:
            images: (N, 3, H, W) uint8.

        Returns:
            (N, classes) float32; each row sums to 1.
        """
        with torch.inference_mode():
            logits: Tensor = self.model(self.normalization(images))
            return logits.float().softmax(1)

    def read(self, path: Path) -> Tensor:
        """Read an image file and resize it to ``image_size``.

        Returns:
            (3, H, W) uint8.

        Raises:
            DataError: the file is not a readable image.
        """
        image = read_image(path, self.image_size)
        if isinstance(image, str):
            raise DataError(f"{path}: the image cannot be read: {image.removeprefix(f'{path}: ')}")
        return image


def _model_section(path: Path) -> dict[str, Any]:
    """Read the section ``model`` of a run's configuration.

    Raises:
        StorageError: the file cannot be read or has no such section.
    """
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(path))
        return dict(config["model"])
    except UNREADABLE as error:
        raise StorageError(f"{path}: the run's configuration cannot be read: {error}. Restore that file") from error


def images_in(paths: Sequence[str]) -> list[Path]:
    """Expand files and folders to image files.

    Args:
        paths: image files, and folders that are searched recursively.

    Returns:
        The image files; those of a folder are sorted.

    Raises:
        DataError: a path does not exist or a folder has no image.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise DataError(f"{path}: there is no image here. Give the path of an image or of a folder of images")
        files += found
    return files


SETTINGS = ("checkpoint", "trusted_modules")


@click.command("predict")
@click.argument("run")
@click.argument("words", nargs=-1, required=True, metavar="IMAGES...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: image, label, probability.")
def command(run: str, words: tuple[str, ...], as_json: bool) -> None:
    """Label IMAGES, files or folders, with the network of RUN.

    RUN is a run folder, an MLflow run id, or `latest`.

    \b
    checkpoint=best|last         the best epoch, which runs with data.validation keep, or the last epoch
                                 (default: best if there is one, else last)
    trusted_modules=[<package>]  your own packages that the network may come from
    """
    settle()
    settings, paths = settings_in(words, SETTINGS)
    which = settings.get("checkpoint", "")
    if which not in ("", "best", "last"):
        raise ConfigError(f"checkpoint={which}: it must be best or last. Set checkpoint=best")
    if not paths:
        raise ConfigError("predict: it takes at least one image. Add the path of an image or a folder")
    run_dir = find_run(run, with_checkpoint=True)
    print(f"network of {run_dir}", file=sys.stderr)
    trusted = settings.get("trusted_modules", "").strip("[]")
    classifier = Classifier.of_run(run_dir, which, trusted.split(",") if trusted else ())
    files = images_in(paths)
    broken: list[str] = []
    for start in range(0, len(files), 500):
        broken += _classify(classifier, files[start : start + 500], as_json)
    if broken:
        raise DataError("\n".join(broken))


def _classify(classifier: Classifier, files: Sequence[Path], as_json: bool) -> list[str]:
    """Print a label for every readable image. Returns a message for each unreadable one."""
    images: dict[Path, Tensor] = {}
    broken: list[str] = []
    for path in files:
        try:
            images[path] = classifier.read(path)
        except DataError as error:
            broken.append(str(error))
    if not images:
        return broken
    best = classifier.probabilities(torch.stack(list(images.values()))).max(1)
    for path, label, probability in zip(images, best.indices.tolist(), best.values.tolist(), strict=True):
        name = classifier.classes[label]
        if as_json:
            print(json.dumps({"image": str(path), "label": name, "probability": round(probability, 4)}))
        else:
            print(f"{path}  {name}  {probability:.1%}")
    return broken
