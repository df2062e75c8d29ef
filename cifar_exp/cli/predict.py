"""`cifar-exp predict`: labels for images from the network of a run."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cifar_exp.cli.words import settings_in
from cifar_exp.errors import ConfigError, DataError
from cifar_exp.system.printable import printable

if TYPE_CHECKING:  # importing torch takes seconds: --help does not wait for it
    from torch import Tensor

    from cifar_exp.runs.classifier import Classifier

SETTINGS = ("checkpoint", "trusted_modules")


@click.command("predict")
@click.argument("run")
@click.argument("words", nargs=-1, required=True, metavar="IMAGES...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line: image, label, probability.")
def command(run: str, words: tuple[str, ...], as_json: bool) -> None:
    """Label IMAGES, files or folders, with the network of RUN.

    RUN is a run folder, an MLflow run id, or `latest`.

    \b
    checkpoint=best|last         best: the best epoch (runs with data.validation); last: the last epoch
                                 (default: best if there is one)
    trusted_modules=[<package>]  packages whose code may run, for your own network
    """
    from cifar_exp.records.find_run import find_run
    from cifar_exp.runs.classifier import Classifier, images_in
    from cifar_exp.system.surroundings import set_up_environment

    set_up_environment()
    settings, paths = settings_in(words, SETTINGS)
    which = settings.get("checkpoint", "")
    if which not in ("", "best", "last"):
        raise ConfigError(f"checkpoint={which}: it must be best or last. Set checkpoint=best")
    if not paths:
        raise ConfigError("predict: it takes at least one image. Add the path of an image or a folder")
    run_dir = find_run(run, with_checkpoint=True)
    print(f"network of {printable(run_dir)}", file=sys.stderr)
    trusted = settings.get("trusted_modules", "").strip("[]")
    classifier = Classifier.of_run(run_dir, which, trusted.split(",") if trusted else ())
    files, skipped = images_in(paths)
    if skipped:
        print(f"skipped files: {skipped}", file=sys.stderr)
    broken: list[str] = []
    for start in range(0, len(files), classifier.batch):
        broken += _classify(classifier, files[start : start + classifier.batch], as_json)
    if broken:
        raise DataError("\n".join(broken))


def _classify(classifier: "Classifier", files: Sequence[Path], as_json: bool) -> list[str]:
    """Print a line for every readable image. Returns the problems of the others."""
    images: dict[Path, Tensor] = {}
    broken: list[str] = []
    for path in files:
        try:
            images[path] = classifier.read(path)
        except DataError as error:
            broken.append(str(error))
    if not images:
        return broken
    for path, (label, probability) in zip(images, classifier.label(list(images.values())), strict=True):
        if as_json:
            print(json.dumps({"image": str(path), "label": label, "probability": round(probability, 4)}))
        else:
            print(f"{printable(path)}  {printable(label)}  {probability:.1%}")
    return broken
