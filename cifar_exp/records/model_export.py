"""Export a run's network as ``model.safetensors``, which plain PyTorch can load (docs/networks.md shows how)."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from cifar_exp.errors import FREE_SPACE, storage_errors
from cifar_exp.records import checkpoint
from cifar_exp.records.checkpoint import Checkpoint
from cifar_exp.system.atomic_files import write_atomically

MODEL_FILE = "model.safetensors"


def publish(run_dir: Path, model: Mapping[str, Any], warn: Callable[[str], None]) -> Path:
    """Write the network of the run's best epoch if there is one, else the network of the last epoch.

    Each entry of the file's metadata is JSON: ``classes``, ``shift`` and ``scale`` (of each channel, 0 to 255: the
    network takes ``(pixel - shift) * scale``), ``image_size`` (height and width that it takes), ``preprocessing`` (how
    an image file is read), ``epoch``, and ``model``.

    Args:
        run_dir: the run's folder, in which the file is written atomically.
        model: the model section of the config for the metadata: `_target_` and its settings.
        warn: called with a message for each damaged checkpoint that is skipped.

    Raises:
        StorageError: the checkpoint cannot be read, or the file cannot be written.
    """
    saved = checkpoint.best(run_dir, warn) or checkpoint.newest(run_dir, warn)
    path = run_dir / MODEL_FILE
    with storage_errors(path, FREE_SPACE):
        write_atomically(path, _content(saved, model))
    return path


def _content(saved: Checkpoint, model: Mapping[str, Any]) -> bytes:
    # Contiguous copies: the format has neither strides nor shared tensors. Only tensors are exported: other state
    # (``get_extra_state``) is only in checkpoints.
    weights = {
        name: value.contiguous().clone() for name, value in saved.model.items() if isinstance(value, torch.Tensor)
    }
    facts = {
        "classes": saved.classes,
        "shift": saved.shift,
        "scale": saved.scale,
        "image_size": saved.image_size,
        "preprocessing": saved.preprocessing,
        "epoch": saved.training["epoch"],
        "model": dict(model),
    }
    return save(weights, {name: json.dumps(value) for name, value in facts.items()})
