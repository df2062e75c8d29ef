"""Temporary."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunFacts:
    title: str
    status: str
    epochs: int
    steps_per_epoch: int
    lr_drops: Sequence[tuple[int, float]]
    details: Mapping[str, str]


def write_progress_page(*args: Any) -> None: ...
def draw_training(*args: Any) -> None: ...
def draw_speedup(*args: Any) -> None: ...
