"""What an index of a shard holds: where each image lies in it, and its label."""

import json
from collections import Counter
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cifar_exp.system.atomic_files import write_atomically

PLACE = np.dtype([("offset", "<i8"), ("size", "<i8"), ("label", "<i8")])


class BadShardError(Exception):
    """A shard cannot be used; the text says why, without its name."""


@dataclass(frozen=True)
class Columns:
    """Which part of a sample is the image and which the label; ``auto`` takes the only one that can be it.

    Attributes:
        image: a column of MDS, or the suffix of a tar's members, such as ``jpg``.
        label: a column of MDS; or ``cls``, or a field of the member ``json``.
    """

    image: str
    label: str


@dataclass(frozen=True)
class ShardIndex:
    """The images of one shard.

    Attributes:
        places: offset and size of each image in bytes and its label, (N,) of type ``PLACE``, in the shard's order.
        is_pixels: images are raw pixels of Pillow (MDS encoding ``pil``), not image files.
        skipped: counts of unused samples and members, by kind.
    """

    places: NDArray[np.void]
    is_pixels: bool
    skipped: Counter[str]

    def write(self, path: Path) -> None:
        content = BytesIO()
        facts = json.dumps({"is_pixels": self.is_pixels, "skipped": self.skipped}).encode()
        np.savez(content, places=self.places, facts=np.frombuffer(facts, dtype=np.uint8))
        write_atomically(path, content.getvalue(), durable=False)

    @classmethod
    def read(cls, path: Path) -> "ShardIndex | None":
        """What :meth:`write` wrote; None if it is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                places, facts = arrays["places"], json.loads(arrays["facts"].tobytes())
            if places.dtype != PLACE or places.ndim != 1:
                return None
            return cls(places, bool(facts["is_pixels"]), Counter(facts["skipped"]))
        except Exception:  # a damaged zip file raises nearly anything
            return None


def places_of(rows: list[tuple[int, int, int]]) -> NDArray[np.void]:
    """Rows of offset, size and label as an array."""
    return np.array(rows, dtype=PLACE)
