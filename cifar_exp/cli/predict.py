"""A trained run -> labels for images: the command `cifar-exp-predict`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from cifar_exp.config.reading import read_config
from cifar_exp.data.batches import Normalization
from cifar_exp.data.image_files import IMAGE_SUFFIXES, read_image
from cifar_exp.errors import CifarExpError, ConfigError, DataError
from cifar_exp.records import checkpoint
from cifar_exp.records.find_run import find_run
from cifar_exp.runs.components import build
from cifar_exp.system.redaction import masked_text

USAGE = """usage: cifar-exp-predict run=<run> [checkpoint=<which>] [--json] <image or folder> ...

Classify images with the network of a finished run.

  run=<run>           latest, a run's folder under outputs/, or an MLflow run id
  checkpoint=<which>  best, of the epoch with the best validation, which runs with data.validation keep, or last;
                      left out: best where there is one
  --json              one JSON object a line: image, label, probability
  trusted_modules=[<package>]  whose code may be run, where the run's network comes from a package of yours
"""


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
            print(f"cifar-exp-predict: {line}", file=sys.stderr)

        saved = None if which == "last" else checkpoint.best(run_dir, warn)
        if saved is None and which == "best":
            raise ConfigError(
                f"checkpoint=best: {run_dir} was trained without data.validation and keeps none. Type checkpoint=last"
            )
        saved = saved or checkpoint.newest(run_dir, warn)
        config = OmegaConf.load(run_dir / "config.yaml")
        assert not isinstance(config, list)
        OmegaConf.update(config, "trusted_modules", list(trusted))
        model = build(read_config(config)).make_model(num_classes=len(saved.classes))  # type: ignore[arg-type]
        model.load_state_dict(saved.model)
        return cls(model.eval(), saved.classes, Normalization(saved.shift, saved.scale), saved.image_size)

    def probabilities(self, images: Tensor) -> Tensor:
        """``images``: (N, 3, H, W) uint8 -> (N, classes) float32, each row adding up to 1."""
        with torch.inference_mode():
            logits: Tensor = self.model(self.normalization(images))
            return logits.float().softmax(1)

    def read(self, path: Path) -> Tensor:
        """An image file as (3, H, W) uint8 of the training images' size.

        Raises:
            DataError: where it is no readable image.
        """
        image = read_image(path, self.image_size)
        if isinstance(image, str):
            raise DataError(f"{path}: the image cannot be read: {image.removeprefix(f'{path}: ')}")
        return image


def images_in(paths: Sequence[str]) -> list[Path]:
    """The image files among ``paths`` and in the folders among them.

    Raises:
        DataError: where a path does not exist or a folder holds no image.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise DataError(f"{path}: there is no image here. Type the path of an image or of a folder of images")
        files += found
    return files


def main() -> None:
    """Print a line an image: path, label, probability. `--json` prints one JSON object a line."""
    words = sys.argv[1:]
    as_json = "--json" in words
    runs = [word.removeprefix("run=") for word in words if word.startswith("run=")]
    which = [word.removeprefix("checkpoint=") for word in words if word.startswith("checkpoint=")]
    trusted = [word.removeprefix("trusted_modules=") for word in words if word.startswith("trusted_modules=")]
    paths = [word for word in words if not word.startswith(("run=", "checkpoint=", "trusted_modules=", "-"))]
    if "-h" in words or "--help" in words:
        print(USAGE)
        return
    try:
        if unknown := [word for word in words if word.startswith("-") and word != "--json"]:
            raise ConfigError(f"{unknown[0]}: there is no such option.\n\n{USAGE}")
        if len(runs) != 1 or not paths:
            raise ConfigError(f"it takes run=<run> and at least one image.\n\n{USAGE}")
        if which and which[-1] not in ("best", "last"):
            raise ConfigError(f"checkpoint={which[-1]}: it must be best or last. Type checkpoint=best")
        run_dir = find_run(runs[0], with_checkpoint=True)
        print(f"network of {run_dir}", file=sys.stderr)
        names = [name for word in trusted for name in word.strip("[]").split(",")]
        classifier = Classifier.of_run(run_dir, "".join(which[-1:]), names)
        files = images_in(paths)
        broken: list[str] = []
        for start in range(0, len(files), 500):
            broken += _classify(classifier, files[start : start + 500], as_json)
        if broken:
            raise DataError("\n".join(broken))
    except CifarExpError as error:
        print(f"cifar-exp-predict: {masked_text(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)


def _classify(classifier: Classifier, files: Sequence[Path], as_json: bool) -> list[str]:
    """Print a line for every image that can be read; what is wrong with the others."""
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
