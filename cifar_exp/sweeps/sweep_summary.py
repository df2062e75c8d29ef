"""Print the jobs and the speedup at the end of a sweep."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_exp.config.schema import ReportSettings
from cifar_exp.errors import CifarExpError, TrackingError
from cifar_exp.records.refused_start import REFUSING_ERRORS
from cifar_exp.system.bugs import described, exit_code, is_bug
from cifar_exp.system.redaction import masked_text

if TYPE_CHECKING:
    from rich.console import Console

    from cifar_exp.study.finished_runs import FinishedRun


@dataclass(frozen=True)
class JobRow:
    """One job of a sweep.

    Attributes:
        number: its number, from 0.
        overrides: its overrides, with secrets masked.
        run_dir: its run folder.
        failure: the exception that ended it; None if it succeeded.
    """

    number: int
    overrides: Sequence[str]
    run_dir: Path
    failure: BaseException | None

    @property
    def is_refused(self) -> bool:
        """Whether the job was refused before it started and left no folder."""
        return isinstance(self.failure, REFUSING_ERRORS) and not self.run_dir.exists()

    @property
    def is_finished(self) -> bool:
        """Whether training finished. A tracking error does not count: the results are on disk."""
        return self.failure is None or isinstance(self.failure, TrackingError)

    @property
    def exit_code(self) -> int:
        return exit_code(self.failure) if self.failure else 0


def common_tags(runs: "Sequence[FinishedRun]") -> dict[str, str]:
    """The device counts and accelerators of all jobs, as tags of the parent run."""
    values = {name: {run.tags[name] for run in runs} for name in ("devices", "accelerator")}
    return {name: ",".join(sorted(found)) for name, found in values.items() if found}


def print_summary(
    rows: Sequence[JobRow], finished: "dict[int, FinishedRun]", sweep_dir: Path, settings: ReportSettings, quiet: bool
) -> tuple[list[tuple[str, float, int]], list[Path]]:
    """Print the table of jobs and the speedup.

    Returns:
        The parent run's metrics as (name, value, step), and the files of the report.
    """
    from cifar_exp.study.finished_runs import overlapping
    from cifar_exp.study.speedup_study import Study
    from cifar_exp.system.terminal import Terminal

    console = Terminal(quiet=quiet)
    _print_jobs(console, rows, finished)
    unfinished = [f"{' '.join(row.overrides)}: {_reason(row)}" for row in rows if not row.is_finished]
    study = Study.of(list(finished.values()), settings, unfinished)
    if oversubscribed := sum(run.tags.get("oversubscribed") == "true" for run in finished.values()):
        console.print(f"{oversubscribed} oversubscribed run(s) are not in the speedup, because their ranks share cores")
    shared = len(overlapping(list(finished.values())))
    if shared and len({run.tags.get("devices") for run in finished.values()}) == 1:
        console.print(f"{shared} jobs ran at the same time on one machine: they shared it, so images/s are lower")
    elif shared:
        console.print(
            f"OVERLAPPING: {shared} jobs ran at the same time as others on one machine: no speedup is computed from "
            f"them. Set hydra/launcher=basic to run one after the other"
        )
    if study is None:
        return [], []
    study.print(console)
    artifacts = study.write(sweep_dir)
    console.print(f"written: {', '.join(map(str, artifacts))}", highlight=False, soft_wrap=True)
    return study.metrics(), artifacts


def _reason(row: JobRow) -> str:
    """One line with the exit code and the error of a failed job."""
    assert row.failure
    if isinstance(row.failure, CifarExpError) and str(row.failure):
        why = masked_text(str(row.failure)).splitlines()[0]
    else:  # the message of other classes needs the class name
        why = f"{'this is a bug: ' if is_bug(row.failure) else ''}{described(row.failure)}"
    return f"failed ({row.exit_code}): {why}"


def _print_jobs(console: "Console", rows: Sequence[JobRow], finished: "dict[int, FinishedRun]") -> None:
    from rich.table import Table

    common = set.intersection(*(set(row.overrides) for row in rows))
    table = Table("job", "overrides", "result", title="Jobs", title_justify="left")
    table.add_column("test accuracy", justify="right")
    table.add_column("images/s", justify="right")
    table.add_column("seconds", justify="right")
    for row in rows:
        overrides = " ".join(override for override in row.overrides if override not in common)
        if not row.is_finished:
            table.add_row(str(row.number), overrides, _reason(row))
            continue
        metrics = finished[row.number].metrics if row.number in finished else {}
        figures = [
            f"{metrics[name]:{form}}" if name in metrics else ""
            for name, form in (
                ("test/accuracy", ".4f"),
                ("steady_images_per_second", ",.0f"),
                ("time/total_seconds", ".1f"),
            )
        ]
        table.add_row(str(row.number), overrides, "done, not recorded" if row.failure else "done", *figures)
    console.print(table)
