"""Trees of class folders."""

import itertools
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

REAL_IMAGES = Path(os.environ.get("CIFAR_EXP_IMAGES", Path(__file__).parents[2] / "data" / "cifar10-images")).resolve()

CPU = torch.device("cpu")
SIDE = 12
MIXED = ((12, 12), (12, 30), (40, 13), (9, 9), (7, 25), (12, 13), (33, 33))  # heights and widths; some below SIDE


def save(path: Path, height: int, width: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def tree(root: Path, sizes: tuple[tuple[int, int], ...] = ((SIDE, SIDE),)) -> Path:
    """26 training and 11 test images of two classes, 13 and 6 of them ants; their sizes cycle through ``sizes``."""
    seeds = itertools.count()
    for folder, count in (("train/ant", 13), ("train/bee", 13), ("test/ant", 6), ("test/bee", 5)):
        for number in range(count):
            seed = next(seeds)
            save(root / folder / f"{number:02d}.png", *sizes[seed % len(sizes)], seed)
    return root
