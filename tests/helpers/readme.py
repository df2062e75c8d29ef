"""The README, and the images for its commands."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import REPO

README = (REPO / "README.md").read_text()
NETWORKS = (REPO / "docs" / "networks.md").read_text()


def folders(root: Path) -> None:
    """Random pictures in three classes, 20 to train and 5 to test each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 5)):
        for name in ("ant", "bee", "cow"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
