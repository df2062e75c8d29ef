"""What a tracker does; and the tracker that does nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cifar_exp.records.run_folder import RunInfo
from cifar_exp.tracking.follower import Sink


class Tracker(Protocol):
    """What `_target_` of ``conf/tracking`` is: opens a sink for a run."""

    def sink(self, run: RunInfo) -> Sink | None:
        """What takes the journal of ``run``, or of the parent run of a sweep."""
        ...

    def hint(self) -> str:
        """What to type to look at the runs."""
        ...

    def store(self) -> str:
        """Where it keeps them, without passwords."""
        ...

    def deliver(self, run_dir: Path) -> str:
        """Bring one run that has ended up to date; what was delivered, in a line."""
        ...


@dataclass(frozen=True)
class NoTracker:
    """The journal is all there is. A preset may name an experiment all the same."""

    experiment: str | None = None

    def sink(self, run: RunInfo) -> None:  # noqa: ARG002
        return None

    def hint(self) -> str:
        return ""

    def store(self) -> str:
        return ""

    def deliver(self, run_dir: Path) -> str:
        return f"{run_dir}: nothing to deliver"
