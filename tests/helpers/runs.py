"""Runs that can be compared bit for bit."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from cifar_exp.records import checkpoint
from cifar_exp.records.journal import Entry
from tests.conftest import TINY

REPEATABLE = [*TINY, "train.epochs=16", "data.train_count=480", "train.deterministic=true", "train.precision=fp32"]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint.newest(run_dir, pytest.fail).model)


def curve(entries: Sequence[Entry]) -> list[tuple[int, str, float]]:
    """The content of a journal without times and facts about the machine."""
    return [
        (entry.step, name, value)
        for entry in entries
        for name, value in entry.metrics.items()
        if not name.startswith(("time", "rank_time/", "machine/")) and "per_second" not in name
    ]
