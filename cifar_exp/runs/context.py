"""Where a run was asked for, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunContext:
    """What a run has to know besides its configuration.

    Attributes:
        folder: where it writes, unless it continues a run that has its own.
        overrides: as typed.
        sweep_dir: the folder of the sweep that it is a job of; None for a single run.
        age: seconds since the command began; they count as start-up.
    """

    folder: Path
    overrides: tuple[str, ...] = ()
    sweep_dir: Path | None = None
    age: float = 0.0

    @property
    def is_single(self) -> bool:
        """Whether the run is no job of a sweep."""
        return self.sweep_dir is None


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        folder: the run folder.
        metrics: the last value of each metric, by MLflow name.
    """

    folder: Path
    metrics: Mapping[str, float]

    @property
    def test_accuracy(self) -> float:
        """Of the last network on the test set, 0 to 1."""
        return self.metrics["test/accuracy"]
