"""The speedup study of a sweep: tables, figure, page, CSV, and metrics of the parent run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cifar_exp.config.schema import ReportSettings
from cifar_exp.errors import FREE_SPACE, storage_errors
from cifar_exp.study import figures, report_page
from cifar_exp.study.finished_runs import FinishedRun, is_simulated, machines, overlapping, results_by_group
from cifar_exp.study.group import Group
from cifar_exp.study.hosts import hosts_sections
from cifar_exp.study.intervals import Interval
from cifar_exp.study.report_page import Section
from cifar_exp.study.speedup import SPEEDUP_ALONE, WITH_INTERVAL, SpeedupRow
from cifar_exp.study.time_breakdown import PARTS, rank_table
from cifar_exp.system.atomic_files import write_atomically, write_csv


@dataclass(frozen=True)
class Study:
    """Speedup by device count, in groups of runs that otherwise differ only in their seed.

    Attributes:
        groups: by the group's name (empty if there is one group).
        simulated: whether the devices were ranks on one CPU.
        machines: one line for each machine of the runs.
        missing: one line for each unfinished job, such as one that diverged.
        report: what was computed in addition to the speedup.
        hosts: tables that compare one host with several.
    """

    groups: Mapping[str, Group]
    simulated: bool
    machines: Sequence[str] = ()
    missing: Sequence[str] = ()
    report: ReportSettings = SPEEDUP_ALONE
    hosts: Sequence[Section] = ()

    @classmethod
    def of(
        cls, runs: Sequence[FinishedRun], report: ReportSettings = SPEEDUP_ALONE, unfinished: Sequence[str] = ()
    ) -> "Study | None":
        """The study of ``runs``; None if no group has two device counts.

        ``unfinished``: one line for each job of the sweep that is not in ``runs``.
        """
        results_of_groups = results_by_group(runs)
        groups = {name: Group.of(results, report) for name, results in results_of_groups.items()}
        groups = {name: group for name, group in groups.items() if len(group.rows) > 1}
        shared = [f"{run.tags.get('overrides', '')}: it ran at the same time as others" for run in overlapping(runs)]
        missing = [f"warning: not in these figures: {job}" for job in [*unfinished, *shared]]
        if not groups:
            return None
        return cls(groups, is_simulated(runs), machines(runs), missing, report, hosts_sections(results_of_groups))

    def print(self, console: Console) -> None:
        """Print a table, the fitted laws and the notes for each group."""
        for title, cells, lines in self._sections():
            table = Table(title=title, title_justify="left")
            headings, *rows = cells
            for place, heading in enumerate(headings):
                table.add_column(heading, justify="right" if place else "left")
            for row in rows:
                table.add_row(*row)
            console.print(table)
            for line in lines:
                console.print(line, highlight=False, markup=False)
        for line in self.missing:
            console.print(line, highlight=False, markup=False)
        for line in self.machines:
            console.print(f"machine: {line}", highlight=False, markup=False)

    def write(self, folder: Path) -> list[Path]:
        """``speedup.csv``, ``speedup.png`` and ``speedup.html`` in ``folder``.

        Raises:
            StorageError: a file cannot be written.
        """
        table, figure, page = (folder / f"speedup.{kind}" for kind in ("csv", "png", "html"))
        with storage_errors(folder, FREE_SPACE):
            rows = [
                {"group": name, "cpu_simulated": self.simulated} | csv_row(row)
                for name, group in self.groups.items()
                for row in group.rows
            ]
            write_csv(table, rows)
            figures.draw_speedup(self.groups, figure, self.simulated)
            title = "Speedup by device count" + self._label()
            sections = self._sections()
            if self.missing:
                sections.append(("Jobs that did not finish", [[]], self.missing))
            write_atomically(page, report_page.report_html(title, figure, sections, self.machines))
        return [table, figure, page]

    def metrics(self) -> list[tuple[str, float, int]]:
        """(name, value, device count) for the parent run; with several groups the name ends with the group's."""
        several = len(self.groups) > 1
        return [
            (f"{metric}/{name}" if several and name else metric, value, devices)
            for name, group in self.groups.items()
            for metric, value, devices in _group_metrics(group)
        ]

    def _label(self) -> str:
        return " (CPU-simulated)" if self.simulated else ""

    def _title(self, group: str) -> str:
        return f"Speedup{self._label()}{f': {group}' if group else ''}"

    def _sections(self) -> list[Section]:
        """For each group the table of results, then the table of times by rank."""
        sections: list[Section] = []
        for name, group in self.groups.items():
            sections.append((self._title(name), self._cells(group), lines_below(group)))
            if by_rank := rank_table(group.breakdowns):
                sections.append((f"Where the time went, by rank{f': {name}' if name else ''}", by_rank, ()))
        return [*sections, *self.hosts]

    def _cells(self, group: Group) -> list[list[str]]:
        """The device counts as headings, then one row of texts per quantity; empty rows are left out."""
        rows = group.rows
        lines = {
            "runs": [str(row.repeats) for row in rows],
            "global batch": [str(row.global_batch_size) for row in rows],
            "images/s": [with_interval(row, "images_per_second", ",.0f") for row in rows],
            "speedup": [with_interval(row, "speedup", ".2f") for row in rows],
            "efficiency": [with_interval(row, "efficiency", ".1%") for row in rows],
            "training, s": [with_interval(row, "train_seconds", ",.1f") for row in rows],
            "training, x faster": [with_interval(row, "time_ratio", ".2f") for row in rows],
            "at steady-state throughput, s": [_optional(row.steady_seconds, ",.1f") for row in rows],
            "with start and evaluation, s": [_optional(row.total_seconds, ",.1f") for row in rows],
            "test accuracy": [with_interval(row, "test_accuracy", ".4f") for row in rows],
        }
        if self.report.target_accuracy is not None:
            target = f"to {self.report.target_accuracy:g}"
            lines[f"{target}: runs"] = [f"{row.reached} of {row.repeats}" for row in rows]
            lines[f"{target}: s"] = [with_interval(row, "seconds_to_accuracy", ",.1f") for row in rows]
            lines[f"{target}: device s"] = [_optional(row.device_seconds_to_accuracy, ",.1f") for row in rows]
            if self.report.price_per_hour is not None:
                lines[f"{target}: price"] = [_optional(row.price_to_accuracy, ",.4g") for row in rows]
        shares = {breakdown.devices: breakdown.shares for breakdown in group.breakdowns}
        for part in PARTS if shares else ():
            lines[f"time: {part}"] = [
                f"{shares[row.devices][part]:.1%}" if part in shares.get(row.devices, {}) else "" for row in rows
            ]
        if any(row.disturbed for row in rows):
            lines["disturbed runs"] = [f"{row.disturbed} of {row.repeats}" if row.disturbed else "" for row in rows]
        headings = ["devices", *(str(row.devices) for row in rows)]
        return [headings, *([name, *texts] for name, texts in lines.items() if any(texts))]


def lines_below(group: Group) -> list[str]:
    """The fitted laws with their warnings, and the notes."""
    warnings = dict.fromkeys(warning for fit in group.fits for warning in fit.warnings)
    return [*map(str, group.fits), *(f"warning: {warning}" for warning in warnings), *group.notes]


def csv_row(row: SpeedupRow) -> dict[str, object]:
    """A row's values by name, and the ends of their intervals as ``<name>_low`` and ``<name>_high``."""
    figures = {column.name: getattr(row, column.name) for column in fields(row) if column.name != "intervals"}
    ends = {name: row.intervals.get(name) for name in WITH_INTERVAL}
    return figures | {
        f"{name}_{end}": getattr(interval, end) if interval else None
        for name, interval in ends.items()
        for end in ("low", "high")
    }


def with_interval(row: SpeedupRow, figure: str, form: str) -> str:
    """A value of the row, and its interval below if there is one."""
    interval = row.intervals.get(figure)
    return _optional(getattr(row, figure), form) + (f"\n{interval_text(interval, form)}" if interval else "")


def interval_text(interval: Interval, form: str) -> str:
    """For example ``1.76-1.86``, with an en dash."""
    return f"{interval.low:{form}}\u2013{interval.high:{form}}"


def _optional(value: float | None, form: str) -> str:
    """The formatted value; empty if it is unknown."""
    return "" if value is None else format(value, form)


def _group_metrics(group: Group) -> list[tuple[str, float, int]]:
    metrics = [
        (metric, value, row.devices)
        for row in group.rows
        for metric, value in (
            ("speedup", row.speedup),
            ("efficiency", row.efficiency),
            ("images_per_second", row.images_per_second),
            ("test/accuracy", row.test_accuracy),
            ("time/train_seconds", row.train_seconds),
            ("time/seconds_to_accuracy", row.seconds_to_accuracy),
        )
        if value is not None
    ]
    for row in group.rows:
        for name in ("speedup", "efficiency", "images_per_second"):
            if interval := row.intervals.get(name):
                metrics += [(f"{name}_low", interval.low, row.devices), (f"{name}_high", interval.high, row.devices)]
    return metrics + [(f"serial_fraction_{fit.law.lower()}", fit.serial_fraction, fit.devices) for fit in group.fits]
