"""Read an untrusted checkpoint: no code is run, and no more memory is used than the size of the file.

``torch.load`` with ``weights_only`` runs no code. But it unpacks compressed entries, and it returns tensors that claim
any shape and values of any type.
"""

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from cifar_exp.system import foreign_files

MOST_VALUES = 2_000_000
MOST_CLASSES = 100_000
MOST_PIXELS = 2**26  # as of an image
FIELDS = ("model", "trained", "training", "classes", "shift", "scale", "image_size")  # that each checkpoint has


def sha256(path: Path, size: int) -> str | None:
    """The sha256 of a file in hex; None if it has another size.

    Raises:
        OSError: it cannot be read, is a link, or is larger than the machine's memory.
    """
    with foreign_files.opened(path, psutil.virtual_memory().total) as file:
        if path.stat().st_size != size:
            return None
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(path: Path) -> dict[str, Any]:
    """The fields of a checkpoint.

    Raises:
        ValueError: it is not a checkpoint, is damaged, or claims more than the file holds.
        OSError: it cannot be read.
    """
    try:
        _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError):
        raise
    except Exception as error:  # torch.load has no common class for errors of damaged files
        raise ValueError(str(error) or type(error).__name__) from error
    _check_values(content)
    _check_fields(content)
    fields: dict[str, Any] = content
    return fields


def _check_archive(path: Path) -> None:
    """``torch.save`` writes an uncompressed zip archive: its entries together are no larger than the file."""
    with foreign_files.opened(path, float("inf")) as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, and torch.save compresses nothing")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its entries claim to be larger than the file")


def _check_values(content: Any) -> None:
    """Check each tensor and the number of values. An object that is in several lists is visited only once."""
    waiting, seen = [content], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            is_plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
            if not is_plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError(f"a tensor claims {tuple(value.shape)} values that are not in the file")
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            waiting += [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
            if len(seen) + len(waiting) > MOST_VALUES:
                raise ValueError("it has too many values")


def _check_fields(content: Any) -> None:
    """Check the types of the fields that prediction and resuming use."""
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError("it has no fields")
    if lacking := [name for name in FIELDS if name not in content]:
        raise ValueError(f"it has no {lacking[0]}")
    sound = {
        "model": _is_state(content["model"]),
        "trained": _is_state(content["trained"]),
        "training": isinstance(content["training"], Mapping),
        "classes": _is_tuple(content["classes"], str) and 1 <= len(content["classes"]) <= MOST_CLASSES,
        "shift": _is_tuple(content["shift"], float, int) and len(content["shift"]) == 3,
        "scale": _is_tuple(content["scale"], float, int) and len(content["scale"]) == 3,
        "image_size": _is_size(content["image_size"]),
        "preprocessing": isinstance(content.get("preprocessing"), Mapping | None),
    }
    if wrong := [name for name, is_sound in sound.items() if not is_sound]:
        raise ValueError(f"{wrong[0]} has a wrong type or value")


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _is_tuple(value: Any, *kinds: type) -> bool:
    return isinstance(value, list | tuple) and all(type(part) in kinds for part in value)


def _is_size(value: Any) -> bool:
    return _is_tuple(value, int) and len(value) == 2 and min(value) > 0 and value[0] * value[1] <= MOST_PIXELS
