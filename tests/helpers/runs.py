"""Runs that can be compared bit for bit."""

from pathlib import Path

import pytest
import torch

from cifar_exp.records import checkpoint
from tests.conftest import TINY

REPEATABLE = [*TINY, "train.epochs=16", "data.train_count=480", "train.deterministic=true", "train.precision=fp32"]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint.newest(run_dir, pytest.fail).model)
