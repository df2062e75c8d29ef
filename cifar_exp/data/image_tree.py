"""Find the image files of a folder and its sub-folders, and count the other files. No image is read."""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from cifar_exp.system.printable import printable

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
_MAX_SUFFIXES_SHOWN = 5
HIDDEN, STRAY = "hidden", "image{s} outside the class folders"
_UNUSABLE = "broken link{s} or special file{s}"
_REPEATED = "folder{s} linked to twice"


class Found(NamedTuple):
    """An image file.

    Attributes:
        path: relative to the folder that was searched, with ``/``.
        size: in bytes.
        mtime_ns: when it was changed.
    """

    path: str
    size: int
    mtime_ns: int


class SkippedFiles(Counter[str]):
    """Counts of unused folder entries by kind: a file suffix, or one of the kinds above."""

    def line(self) -> str:
        """Such as ``2 hidden, 3 of other kinds (.txt, .heic)``; empty if all entries are used."""
        suffixes = {kind: count for kind, count in self.items() if kind.startswith(".") or not kind}
        named = sorted(suffixes, key=lambda kind: (-suffixes[kind], kind))
        shown = [printable(kind)[:20] or "no suffix" for kind in named[:_MAX_SUFFIXES_SHOWN]]
        more = ["..."] if len(named) > _MAX_SUFFIXES_SHOWN else []
        others = f"{sum(suffixes.values()):,} of other kinds ({', '.join([*shown, *more])})"
        parts = [
            f"{count:,} {kind.format(s='s'[: count != 1])}"
            for kind, count in sorted(self.items())
            if kind not in suffixes and count
        ]
        return ", ".join([*parts, *([others] if suffixes else [])])


def images_below(folder: Path, skipped: SkippedFiles) -> list[Found]:
    """The image files in ``folder`` and in its sub-folders, sorted by path; links are followed.

    Hidden files and folders, and files without an image suffix are counted in ``skipped``.

    Raises:
        OSError: a folder cannot be read.
    """
    found: list[Found] = []
    seen = {_identity(folder.stat())}
    waiting = [""]
    while waiting:
        below = waiting.pop()
        with os.scandir(folder / below) as entries:
            for entry in entries:
                path = f"{below}{entry.name}"
                if entry.name.startswith("."):
                    skipped[HIDDEN] += 1
                elif entry.is_dir():
                    identity = _identity(entry.stat())
                    if identity in seen:  # links may form a cycle
                        skipped[_REPEATED] += 1
                    else:
                        seen.add(identity)
                        waiting.append(f"{path}/")
                elif not entry.is_file():
                    skipped[_UNUSABLE] += 1
                elif not is_image_name(entry.name):
                    skipped[os.path.splitext(entry.name)[1].lower()] += 1  # noqa: PTH122 - a name, not a path
                else:
                    stat = entry.stat()
                    found.append(Found(path, stat.st_size, stat.st_mtime_ns))
    return sorted(found)


def is_image_name(name: str) -> bool:
    """Whether a file's name ends as those of images do."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino
