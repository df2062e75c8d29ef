"""The context in which a run is started, and its result."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunContext:
    """The inputs of a run besides its configuration.

    Attributes:
        folder: the run folder of a new run. A resumed run uses its own.
        overrides: the overrides of the command line.
        sweep_dir: the folder of its sweep; None for a single run.
        age: seconds since the command was started; they count as start-up.
    """

    folder: Path
    overrides: tuple[str, ...] = ()
    sweep_dir: Path | None = None
    age: float = 0.0

    @property
    def is_single(self) -> bool:
        """Whether the run is not a job of a sweep."""
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
        """Accuracy of the last epoch's network on the test set, 0 to 1."""
        return self.metrics["test/accuracy"]
