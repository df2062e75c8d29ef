"""Write a dataset as a tree of class folders with PNG images."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from torch import Tensor

from cifar_exp.data.dataset_files import DatasetFiles
from cifar_exp.data.presence import SPLITS, SplitName
from cifar_exp.errors import storage_errors
from cifar_exp.system.atomic_files import atomic_path
from cifar_exp.system.locks import locked
from cifar_exp.system.progress_line import Progress

Counts = Counter[tuple[str, str, str]]
"""(split, class, ``written`` or ``skipped``) -> images."""


def export(files: DatasetFiles, folder: Path) -> Counts:
    """Write each image as ``<folder>/<split>/<class>/NNNN.png``, numbered from 1; existing files are kept.

    Raises:
        StorageError: the folder cannot be written.
    """
    counts: Counts = Counter()
    advice = "Free space there, or set --to=<another folder>"
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
    """Write an image (3, H, W) uint8, atomically."""
    image, path = job
    if path.exists():
        return "skipped"
    with atomic_path(path, durable=False) as temporary:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, format="PNG")
    return "written"


def table(classes: Sequence[str], counts: Counts) -> str:
    """Images by class: written, and skipped because they already existed."""
    columns = [(split, outcome) for split in SPLITS for outcome in ("written", "skipped")]
    rows = [(name, [counts[split, name, outcome] for split, outcome in columns]) for name in classes]
    sums = ("all", [sum(cells) for cells in zip(*(cells for _, cells in rows), strict=True)])
    width = max(len(name) for name in ("class", *classes))
    lines = ["class".ljust(width) + "".join(f"{split + ' ' + outcome:>15}" for split, outcome in columns)]
    lines += [name.ljust(width) + "".join(f"{cell:>15,}" for cell in cells) for name, cells in (*rows, sums)]
    return "\n".join(lines)
