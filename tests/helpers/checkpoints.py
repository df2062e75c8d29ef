"""Checkpoints to save, alter and load."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_exp.models.networks import convnet
from cifar_exp.records.checkpoint import Checkpoint, CheckpointPosition, sealed


def trained(seed: int = 0) -> Checkpoint:
    torch.manual_seed(seed)
    model = convnet(num_classes=3, width=4, depth=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 3, 16, 16)).sum().backward()  # moves the batch-norm statistics
    optimizer.step()
    return Checkpoint(
        model=model.state_dict(),
        trained={name: value + 1 for name, value in model.state_dict().items()},
        training={"optimizer": optimizer.state_dict(), "epoch": 7, "seconds": {"step": 0.1}, "rates": [1.5, 2.5]},
        classes=("ant", "bee", "żaba"),
        shift=(125.3, 122.95, 113.87),
        scale=(1 / 63, 1.0, 0.5),
        image_size=(16, 24),
    )


def position(step: int) -> CheckpointPosition:
    return CheckpointPosition(
        step // 10, step, 64, world_size=2, data_hash="ab" * 32, config_hash="cd" * 32, seconds=1.5
    )


def silent(line: str) -> None:
    pytest.fail(f"nothing is wrong, but it says: {line}")


def reseal(path: Path, **changes: Any) -> None:
    """Rewrite a manifest with changed fields and a valid seal, as an attacker could."""
    fields = json.loads(path.read_text())
    del fields["seal"]
    path.write_bytes(sealed(fields | changes))


class Malicious:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)
