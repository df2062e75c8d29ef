"""The parent run of a sweep in MLflow."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from cifar_exp.config.mlflow_settings import with_environment
from cifar_exp.errors import FREE_SPACE, Stopped, StorageError, TrackingError, storage_errors
from cifar_exp.records import journal
from cifar_exp.records.run_folder import SWEEP_RUN_FILE, Outcome, RunInfo
from cifar_exp.records.run_identity import claimed_parent_run
from cifar_exp.runs.components import build_tracker
from cifar_exp.system.printable import print_notice
from cifar_exp.tracking.tracker import NoTracker, Tracker, tracking_lines

if TYPE_CHECKING:
    from cifar_exp.records.run_folder import Status


class ParentRun:
    """The parent run of a sweep. It is stored on disk like any other run.

    The first job that opens a run in the tracker opens the parent run, too. Everything else of the parent run is
    delivered at the end, so that no job waits for the tracker.
    """

    def __init__(self, config: DictConfig, sweep_dir: Path, tags: Mapping[str, str]) -> None:
        tracker: Tracker = build_tracker(config) if "tracking" in config else NoTracker()
        self.hint = tracker.hint()  # the command that shows the sweep
        section = OmegaConf.to_container(config.tracking, resolve=True) if "tracking" in config else {}
        self.lines = tracking_lines(with_environment(cast("dict[str, Any]", section)), tracker)  # about the store
        new = RunInfo(f"sweep {sweep_dir.name}", sweep_dir, {}, tags, time.time())
        self._info = claimed_parent_run(sweep_dir) if (sweep_dir / SWEEP_RUN_FILE).exists() else new
        self._info.save_sweep()
        self._tracker = tracker
        self.is_new, self._is_discarded = self._info is new, False
        Outcome.forget(sweep_dir)

    def log(self, metrics: Sequence[tuple[str, float, int]], artifacts: Sequence[str], tags: Mapping[str, str]) -> None:
        """Record the results of the sweep.

        Args:
            metrics: (name, value, step).
            artifacts: names of files in the sweep's folder.
            tags: added to the tags of the parent run.
        """
        self._info = replace(self._info, artifacts=artifacts, tags={**self._info.tags, **tags})
        self._info.save_sweep()
        known = set()
        with suppress(StorageError):  # a damaged journal is rewritten
            entries = journal.read(self._info.run_dir)
            known = {(name, value, entry.step) for entry in entries for name, value in entry.metrics.items()}
        if known == set(metrics):  # a resumed sweep without new results keeps the points and their times
            return
        (self._info.run_dir / journal.JOURNAL_FILE).unlink(missing_ok=True)  # the summary is rewritten
        if not metrics:
            return
        writer = journal.JournalWriter(self._info.run_dir)
        elapsed = time.time() - self._info.started
        for step in sorted({step for _, _, step in metrics}):
            values = {name: value for name, value, there in metrics if there == step}
            writer.write(journal.Entry(step, 0, elapsed, values))
        writer.close()

    def discard(self) -> None:
        """All jobs were refused: record nothing of the sweep, on disk or in the tracker."""
        self._is_discarded = True
        (self._info.run_dir / SWEEP_RUN_FILE).unlink(missing_ok=True)

    def __enter__(self) -> "ParentRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the run as FINISHED, FAILED or KILLED.

        Raises:
            TrackingError: all jobs succeeded, but not everything could be delivered to the tracker.
        """
        from cifar_exp.tracking.deadlines import ANSWER_SECONDS, seconds_after_signal
        from cifar_exp.tracking.follower import Follower, undelivered_message

        if self._is_discarded:
            return
        stopped = kind is not None and issubclass(kind, Stopped)
        status: Status = "FINISHED" if kind is None else "KILLED" if stopped else "FAILED"
        try:
            with storage_errors(self._info.run_dir, FREE_SPACE):
                Outcome(status, time.time()).save(self._info.run_dir)
        except StorageError:
            if error is None:
                raise
        sink = self._tracker.sink(self._info)
        if sink is None:
            return
        follower = Follower(self._info.run_dir, sink, interval=ANSWER_SECONDS)
        follower.start()
        if isinstance(error, Stopped):
            left = seconds_after_signal(error.received)
            follower.finish(status, left, left)
        else:
            follower.finish(status, ANSWER_SECONDS)
        if follower.error:
            undelivered = undelivered_message(follower.error, self._info.run_dir)
            message = f"tracking.uri: of the sweep's parent run {undelivered}"
            if error is None:
                raise TrackingError(message)
            print_notice(message)
