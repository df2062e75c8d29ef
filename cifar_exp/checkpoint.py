"""What is saved of a run, atomically, and how it comes back."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_exp.errors import StorageError

FILE_NAME = "checkpoints/last.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and what is needed to use it.

    Attributes:
        model: the state dict, on the CPU.
        epoch: epochs trained.
        step: steps trained.
        classes: names of the labels, in order.
        shift: subtracted from each channel, 0..255.
        scale: multiplied to each channel after that.
        image_size: height and width of the training images.
    """

    model: Mapping[str, Tensor]
    epoch: int
    step: int
    classes: tuple[str, ...]
    shift: tuple[float, ...]
    scale: tuple[float, ...]
    image_size: tuple[int, int]


def save(run_dir: Path, checkpoint: Checkpoint) -> None:
    """Write the run's last checkpoint; a reader sees the old one or the new one, never a part.

    Raises:
        StorageError: where the file system refuses.
    """
    path = run_dir / FILE_NAME
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            torch.save(dict(vars(checkpoint)), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        with suppress(OSError):  # of the same cause, such as a file where a folder should be
            temporary.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: the network could not be saved: {error}. Free space there and start again"
        ) from error


def load(run_dir: Path) -> Checkpoint:
    """Read the run's last checkpoint; nothing in it is executed (``weights_only``).

    Raises:
        StorageError: where there is none or it cannot be read.
    """
    path = run_dir / FILE_NAME
    if not path.exists():
        raise StorageError(f"{path}: there is no saved network. Name a run that has finished at least one epoch")
    try:
        fields: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return Checkpoint(**fields)
    except Exception as error:  # torch.load has no common class for what a damaged file raises
        raise StorageError(f"{path}: the saved network cannot be read: {error}") from error
