"""The interface of trackers, and the tracker that does nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cifar_exp.config.mlflow_settings import MLFLOW_TRACKER, variables_in
from cifar_exp.records.run_folder import RunInfo
from cifar_exp.system.printable import printable
from cifar_exp.tracking.follower import Sink


class Tracker(Protocol):
    """The interface of ``conf/tracking``."""

    def sink(self, run: RunInfo) -> Sink | None:
        """The sink for the journal of ``run``, which may be the parent run of a sweep."""
        ...

    def hint(self) -> str:
        """The command or address that shows the runs."""
        ...

    def store(self) -> str:
        """The store as text, without passwords."""
        ...

    def deliver(self, run_dir: Path) -> str:
        """Deliver the data of an ended run that the store lacks; returns one line about it."""
        ...


def tracking_lines(section: Mapping[str, Any], tracker: Tracker) -> list[str]:
    """A line about the store, if it is not the default one, and the MLflow variables that are used; else nothing.

    Args:
        section: the settings of ``tracker``.
        tracker: the tracker.
    """
    given = variables_in(section) if section.get("_target_") == MLFLOW_TRACKER else ""
    if not tracker.store() or not (given or section.get("uri")):
        return []
    return [f"tracking: {printable(tracker.store())}{f' ({given})' if given else ''}"]


@dataclass(frozen=True)
class NoTracker:
    """No tracking: only the journal is written. ``experiment`` is accepted, since presets set it."""

    experiment: str | None = None

    def sink(self, run: RunInfo) -> None:  # noqa: ARG002
        return None

    def hint(self) -> str:
        return ""

    def store(self) -> str:
        return ""

    def deliver(self, run_dir: Path) -> str:
        return f"{run_dir}: nothing to deliver"
