"""Finished runs -> the speedup table, as text, CSV, figure and metrics; and the command that makes it again."""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from cifar_exp import figures
from cifar_exp.errors import CifarExpError, ConfigError
from cifar_exp.privacy import masked_text
from cifar_exp.record import run_id
from cifar_exp.scaling import RunResult, SpeedupRow, grouped, speedup_rows
from cifar_exp.tracking import MLflowTracker

if TYPE_CHECKING:
    from mlflow.entities import Run


@dataclass(frozen=True)
class FinishedRun:
    """A run as a report sees it: its tags and the last value of each metric."""

    tags: Mapping[str, str]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Study:
    """Speedup over device counts, in groups of runs that differ in nothing else but their seed.

    Attributes:
        groups: rows in ascending device count, by the group's name (empty where there is one group).
        simulated: whether several ranks shared one CPU, which says nothing of several machines.
    """

    groups: Mapping[str, Sequence[SpeedupRow]]
    simulated: bool

    @classmethod
    def of(cls, runs: Sequence[FinishedRun]) -> "Study | None":
        """The study that ``runs`` make up; None where no group has two device counts.

        Runs whose ranks shared a device say nothing about more devices and are left out.
        """
        counted = [run for run in runs if run.tags.get("oversubscribed") != "true" and "test/accuracy" in run.metrics]
        names = grouped([run.tags.get("overrides", "").split() for run in counted])
        groups: dict[str, Sequence[SpeedupRow]] = {}
        for name in dict.fromkeys(names):
            results = [RunResult.of(run.metrics) for run, group in zip(counted, names, strict=True) if group == name]
            rows = speedup_rows(results)
            if len(rows) > 1:
                groups[name] = rows
        if not groups:
            return None
        return cls(groups, simulated=any(run.tags.get("accelerator") == "cpu" for run in counted))

    def print(self, console: Console) -> None:
        """One table a group."""
        label = " (CPU-simulated)" if self.simulated else ""
        for name, rows in self.groups.items():
            table = Table(title=f"Speedup{label}{f': {name}' if name else ''}", title_justify="left")
            for heading in (
                "devices",
                "global batch",
                "images/s",
                "speedup",
                "efficiency",
                "seconds",
                "x faster",
                "test accuracy",
            ):
                table.add_column(heading, justify="right")
            for row in rows:
                table.add_row(
                    str(row.devices),
                    str(row.global_batch_size),
                    f"{row.images_per_second:,.0f}",
                    f"{row.speedup:.2f}",
                    f"{row.efficiency:.1%}",
                    f"{row.train_seconds:.1f}",
                    f"{row.time_ratio:.2f}",
                    f"{row.test_accuracy:.4f}",
                )
            console.print(table)

    def write(self, folder: Path) -> list[Path]:
        """``speedup.csv`` and ``speedup.png`` in ``folder``."""
        table, figure = folder / "speedup.csv", folder / "speedup.png"
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["group", "cpu_simulated", *(field.name for field in fields(SpeedupRow))])
            writer.writeheader()
            writer.writerows(
                {"group": name, "cpu_simulated": self.simulated} | asdict(row)
                for name, rows in self.groups.items()
                for row in rows
            )
        figures.draw_speedup(self.groups, figure, self.simulated)
        return [table, figure]

    def metrics(self) -> list[tuple[str, float, int]]:
        """(name, value, device count) for the parent run; with several groups the name carries the group's."""
        several = len(self.groups) > 1
        return [
            (f"{metric}/{name}" if several and name else metric, value, row.devices)
            for name, rows in self.groups.items()
            for row in rows
            for metric, value in (
                ("speedup", row.speedup),
                ("efficiency", row.efficiency),
                ("images_per_second", row.images_per_second),
                ("test/accuracy", row.test_accuracy),
                ("time/train_seconds", row.train_seconds),
            )
        ]


def main() -> None:
    """The command `cifar-exp-report`."""
    parser = argparse.ArgumentParser(prog="cifar-exp-report", description="Make a sweep's speedup table from MLflow.")
    parser.add_argument("sweep", help="the sweep's parent run: its id, or the sweep's folder under outputs/multirun")
    parser.add_argument("--uri", help="MLflow's tracking address (default: the SQLite store under outputs/)")
    parser.add_argument(
        "--to", type=Path, default=Path(), help="folder for speedup.csv and speedup.png (default: here)"
    )
    arguments = parser.parse_args()
    try:
        runs = stored_children(MLflowTracker(uri=arguments.uri), arguments.sweep)
        study = Study.of(runs)
        if study is None:
            raise ConfigError(
                f"{arguments.sweep}: a speedup needs finished runs with at least two device counts, found "
                f"{len(runs)} run(s). Type cifar-exp -m experiment=speedup devices.count=1,2"
            )
        study.print(Console())
        arguments.to.mkdir(parents=True, exist_ok=True)
        print("\n".join(str(path) for path in study.write(arguments.to)))
    except CifarExpError as error:
        print(f"cifar-exp-report: {masked_text(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)


def stored_children(tracker: MLflowTracker, sweep: str) -> list[FinishedRun]:
    """The finished runs of a sweep, from MLflow.

    Raises:
        ConfigError: where there is no such sweep in the store.
    """
    from mlflow.exceptions import MlflowException

    client = tracker.client()
    parent = run_id(Path(sweep)) or sweep
    try:
        experiment = client.get_run(parent).info.experiment_id
    except MlflowException as error:
        raise ConfigError(
            f"{sweep}: there is no such run in {tracker.address()}. Type a parent run's id or a folder under "
            f"outputs/multirun, and --uri where the store lies elsewhere"
        ) from error
    children: Sequence[Run] = client.search_runs(
        [experiment],
        f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'FINISHED'",
        max_results=1000,
        order_by=["attributes.start_time ASC"],
    )
    return [FinishedRun(run.data.tags, run.data.metrics) for run in children]
