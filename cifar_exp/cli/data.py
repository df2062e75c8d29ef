"""`cifar-exp data`: export the CIFAR-10 archive as class folders of PNG images.

PNG is lossless, so the pixels are those of the release. ``data=folders data.root=data/cifar10-folders`` trains on them.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
from PIL import Image
from torch import Tensor

from cifar_exp.cli.words import settings_in
from cifar_exp.data.cifar10 import cifar10
from cifar_exp.data.dataset_files import SPLITS, DatasetFiles, SplitName
from cifar_exp.errors import ConfigError, storage_errors
from cifar_exp.system.atomic_files import atomic_path
from cifar_exp.system.locks import locked
from cifar_exp.system.progress_line import Progress
from cifar_exp.system.surroundings import settle

Counts = Counter[tuple[str, str, str]]
"""(split, class, ``written`` or ``skipped``) -> number of images."""


SETTINGS = ("data.root", "data.archive", "data.mirror")


@click.command("data")
@click.argument("words", nargs=-1, metavar="[SETTINGS]...")
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    default=Path("data/cifar10-folders"),
    show_default=True,
    help="Folder for the images.",
)
def command(words: tuple[str, ...], to: Path) -> None:
    """Fetch CIFAR-10, verify it, and write it as train/<class>/NNNN.png and test/<class>/NNNN.png.

    \b
    data.root=data       folder for the archive and its decoded copy
    data.archive=<file>  a local cifar-10-python.tar.gz; then nothing is downloaded
    data.mirror=<URL>    another address of cifar-10-python.tar.gz
    """
    settle()
    typed, rest = settings_in(words, SETTINGS)
    if rest:
        raise ConfigError(f"{rest[0]}: it must be one of {', '.join(f'{name}=...' for name in SETTINGS)}")
    root = typed.get("data.root", "data")
    files = cifar10(root, mirror=typed.get("data.mirror"), archive=typed.get("data.archive"))
    try:
        counts = export(files, to)
    except KeyboardInterrupt:
        print("Stopped. Written files are kept; run the same command again to continue.", file=sys.stderr)
        raise
    print(table(files.classes, counts))
    print(f"To train on them: cifar-exp data=folders data.root={to}")


def export(files: DatasetFiles, folder: Path) -> Counts:
    """Write each image as ``<folder>/<split>/<class>/NNNN.png``, numbered from 1. Existing files are skipped.

    Args:
        files: the data set.
        folder: the root of the class folders; it is created if missing.

    Returns:
        The number of images by split, class and outcome.

    Raises:
        StorageError: the folder cannot be written.
    """
    counts: Counts = Counter()
    advice = "Make room, or choose another folder: --to <folder>"
    with locked(folder / ".lock", advice), storage_errors(folder, advice):  # another export may be running
        for split in SPLITS:
            counts += _export_split(files, split, folder)
    return counts


def _export_split(files: DatasetFiles, split: SplitName, folder: Path) -> Counts:
    data = files.load(split)
    numbers: Counter[int] = Counter()
    jobs: list[tuple[Tensor, Path]] = []
    for image, label in zip(data.images, data.labels.tolist(), strict=True):
        numbers[label] += 1
        jobs.append((image, folder / split / files.classes[label] / f"{numbers[label]:04d}.png"))
    for name in files.classes:
        (folder / split / name).mkdir(parents=True, exist_ok=True)
    counts: Counts = Counter()
    with ThreadPoolExecutor() as pool, Progress(f"Writing {split} images", len(jobs), "files") as progress:
        for (_, path), outcome in zip(jobs, pool.map(_write, jobs), strict=True):
            counts[split, path.parent.name, outcome] += 1
            progress.add(1)
    return counts


def _write(job: tuple[Tensor, Path]) -> str:
    """Write an image, (3, H, W) uint8, atomically. Returns ``written`` or ``skipped``."""
    image, path = job
    if path.exists():
        return "skipped"
    with atomic_path(path, durable=False) as temporary:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, format="PNG")
    return "written"


def table(classes: Sequence[str], counts: Counts) -> str:
    """The number of images written and skipped, as a text table with a row for each class."""
    columns = [(split, outcome) for split in SPLITS for outcome in ("written", "skipped")]
    rows = [(name, [counts[split, name, outcome] for split, outcome in columns]) for name in classes]
    sums = ("all", [sum(cells) for cells in zip(*(cells for _, cells in rows), strict=True)])
    width = max(len(name) for name in ("class", *classes))
    lines = ["class".ljust(width) + "".join(f"{split + ' ' + outcome:>15}" for split, outcome in columns)]
    lines += [name.ljust(width) + "".join(f"{cell:>15,}" for cell in cells) for name, cells in (*rows, sums)]
    return "\n".join(lines)
