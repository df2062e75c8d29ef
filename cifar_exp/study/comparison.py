"""Compare two sweeps, such as before and after a change or on two machines, and test each difference."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import exp
from operator import attrgetter
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from cifar_exp.config.result_settings import distinguishes_sweeps
from cifar_exp.errors import FREE_SPACE, ConfigError, storage_errors
from cifar_exp.study import figures, report_page
from cifar_exp.study.finished_runs import FinishedRun, is_simulated, machines, results_by_group
from cifar_exp.study.group import SIGNIFICANT, Group
from cifar_exp.study.intervals import Interval, Means, adjusted, difference
from cifar_exp.study.run_result import RunResult
from cifar_exp.study.speedup import accuracy_means, by_count, log_means
from cifar_exp.study.speedup_study import interval_text
from cifar_exp.system.atomic_files import write_atomically, write_csv

TEST = (
    "Welch's t test of each difference (logarithms of throughput and times; a separate variance per device count); "
    "p values adjusted by Holm's method"
)
SINGLE_RUNS = (
    "noise between runs unknown: a sweep has a single run at some device count, so differences there cannot be "
    "tested. Set seed=0,1,2 in both sweeps"
)
RunsByCount = Mapping[int, Sequence[RunResult]]


@dataclass(frozen=True)
class Difference:
    """The difference of one quantity at one device count between both sweeps.

    Attributes:
        group: name of the group.
        devices: number of ranks.
        quantity: ``images_per_second``, ``speedup`` (relative to the smallest common count),
            ``train_seconds`` or ``test_accuracy``.
        first: median in the first sweep.
        second: median in the second sweep.
        change: second / first; for the accuracy second - first.
        interval: 95 % interval of the change; None if the noise is unknown.
        probability: p value of the difference, adjusted for the number of differences.
    """

    group: str
    devices: int
    quantity: str
    first: float
    second: float
    change: float
    interval: Interval | None
    probability: float | None

    @property
    def verdict(self) -> str:
        if self.probability is None:
            return "noise between runs unknown"
        return "beyond noise" if self.probability < SIGNIFICANT else "within noise"


@dataclass(frozen=True)
class Comparison:
    """Two sweeps.

    Attributes:
        names: the names of the sweeps.
        pairs: the name of each common group, and its results in each sweep.
        differences: of all quantities at all common device counts.
        simulated: whether the devices of a sweep were ranks on one CPU.
        notes: sentences below the table.
    """

    names: tuple[str, str]
    pairs: Sequence[tuple[str, Sequence[RunResult], Sequence[RunResult]]]
    differences: Sequence[Difference]
    simulated: bool
    notes: Sequence[str]

    @classmethod
    def of(cls, names: tuple[str, str], first: Sequence[FinishedRun], second: Sequence[FinishedRun]) -> "Comparison":
        """Compare the common groups and device counts of two sweeps.

        Raises:
            ConfigError: the sweeps have none in common.
        """
        pairs = _common_groups(results_by_group(first), results_by_group(second))
        found = [item for pair in pairs for item in _differences(*pair)]
        if not found:
            raise ConfigError(
                f"{names[0]} and {names[1]}: they have no finished runs of the same group and device count. Compare "
                f"two sweeps over the same devices.count and settings"
            )
        known = [item.probability for item in found if item.probability is not None]
        corrected = iter(adjusted(known))
        differences = [
            item if item.probability is None else replace(item, probability=next(corrected)) for item in found
        ]
        notes = [TEST, *([SINGLE_RUNS] if any(_has_single_run(group) for _, *both in pairs for group in both) else [])]
        notes += _other_settings(names, first, second)
        for name, runs in zip(names, (first, second), strict=True):
            notes += [f"{name}: {line}" for line in machines(runs)]
        for name, *both in pairs:
            for sweep, results in zip(names, both, strict=True):
                lines = Group.of(results).notes
                notes += [f"{sweep} {name}: {line}" for line in lines if line.startswith("DISTURBED")]
        return cls(names, pairs, differences, is_simulated([*first, *second]), notes)

    def print(self, console: Console) -> None:
        """One table of all differences, and the notes."""
        table = Table(title=self._title(), title_justify="left")
        headings, *cells = self._cells()
        for heading in headings:
            table.add_column(heading, justify="left" if heading in ("devices", "figure", "difference") else "right")
        for row in cells:
            table.add_row(*row)
        console.print(table)
        for line in self.notes:
            console.print(line, highlight=False, markup=False)

    def write(self, folder: Path) -> list[Path]:
        """``comparison.csv``, ``comparison.png`` and ``comparison.html`` in ``folder``.

        Raises:
            StorageError: a file cannot be written.
        """
        table, figure, page = (folder / f"comparison.{kind}" for kind in ("csv", "png", "html"))
        with storage_errors(folder, FREE_SPACE):
            write_csv(table, [_csv_row(item) for item in self.differences])
            drawn = [(name, Group.of(one), Group.of(two), self._ratios(name)) for name, one, two in self.pairs]
            figures.draw_comparison(self.names, drawn, figure, self.simulated)
            sections = [("Differences", self._cells(), self.notes)]
            write_atomically(page, report_page.report_html(self._title(), figure, sections, ()))
        return [table, figure, page]

    def _title(self) -> str:
        return f"{self.names[1]} against {self.names[0]}" + (" (CPU-simulated)" if self.simulated else "")

    def _ratios(self, group: str) -> dict[int, tuple[float, Interval | None]]:
        return {
            item.devices: (item.change, item.interval)
            for item in self.differences
            if item.group == group and item.quantity == "images_per_second"
        }

    def _cells(self) -> list[list[str]]:
        """The headings, then one row of texts per difference; interval and p are below change and verdict."""
        short = [name.partition(":")[0] for name in self.names]
        return [
            ["devices", "figure", *short, f"{short[1]} / {short[0]}, or minus", "difference"],
            *map(_texts, self.differences),
        ]


def _other_settings(names: tuple[str, str], first: Sequence[FinishedRun], second: Sequence[FinishedRun]) -> list[str]:
    """A sentence for each setting that distinguishes the sweeps."""
    lines = []
    for name in sorted({name for run in (*first, *second) for name in run.params}):
        if not distinguishes_sweeps(name):
            continue
        one, two = (sorted({str(run.params.get(name)) for run in sweep}) for sweep in (first, second))
        if one != two:
            first_name, second_name = (text.partition(":")[0] for text in names)
            lines.append(f"{first_name} has {name}={','.join(one)}, {second_name} {name}={','.join(two)}")
    return lines


def _common_groups(
    first: Mapping[str, Sequence[RunResult]], second: Mapping[str, Sequence[RunResult]]
) -> list[tuple[str, Sequence[RunResult], Sequence[RunResult]]]:
    """Groups of the same name. If each sweep has a single group, their names may differ."""
    if len(first) == len(second) == 1:
        ((name, two),) = second.items()
        return [(name, next(iter(first.values())), two)]
    return [(name, first[name], second[name]) for name in first if name in second]


def _differences(group: str, first: Sequence[RunResult], second: Sequence[RunResult]) -> list[Difference]:
    one, two = by_count(first), by_count(second)
    shared = [count for count in one if count in two]
    found = []
    for devices in shared:
        found.append(_difference(group, one, two, "images_per_second", devices))
        if devices > shared[0]:
            found.append(_difference(group, one, two, "speedup", devices, over=shared[0]))
        found += [_difference(group, one, two, quantity, devices) for quantity in ("train_seconds", "test_accuracy")]
    return found


def _difference(
    group: str, one: RunsByCount, two: RunsByCount, quantity: str, devices: int, over: int | None = None
) -> Difference:
    """The difference of one quantity at one device count. ``over``: compare its ratio to the quantity at that count."""
    measured = "images_per_second" if quantity == "speedup" else quantity
    before, after = (
        _median(sweep[devices], measured) / (_median(sweep[over], measured) if over else 1) for sweep in (one, two)
    )
    first, second = ([(count == devices) - float(count == over) for count in sweep] for sweep in (one, two))
    estimate = difference(_means(one, measured).sum(first), _means(two, measured).sum(second))
    change = after - before if quantity == "test_accuracy" else after / before
    if estimate is None:
        return Difference(group, devices, quantity, before, after, change, None, None)
    interval = estimate.interval() if quantity == "test_accuracy" else estimate.interval().mapped(exp)
    return Difference(group, devices, quantity, before, after, change, interval.around(change), estimate.probability())


def _median(results: Sequence[RunResult], quantity: str) -> float:
    return float(median(getattr(result, quantity) for result in results))


def _means(results: RunsByCount, quantity: str) -> Means:
    """Means of the accuracy, or of the logarithm of a throughput or time."""
    if quantity == "test_accuracy":
        return accuracy_means(results)
    return log_means(results, attrgetter(quantity))


def _has_single_run(results: Sequence[RunResult]) -> bool:
    return any(len(runs) == 1 for runs in by_count(results).values())


def _texts(item: Difference) -> list[str]:
    """One difference as the cells of a row."""
    quantity, form, change = {
        "images_per_second": ("images/s", ",.0f", ".3f"),
        "speedup": ("speedup", ".2f", ".3f"),
        "train_seconds": ("training, s", ",.1f", ".3f"),
        "test_accuracy": ("test accuracy", ".4f", "+.4f"),
    }[item.quantity]
    return [
        f"{item.devices} {item.group}".rstrip(),
        quantity,
        format(item.first, form),
        format(item.second, form),
        format(item.change, change) + (f"\n{interval_text(item.interval, change)}" if item.interval else ""),
        item.verdict if item.probability is None else f"{item.verdict}\np = {item.probability:.2g}",
    ]


def _csv_row(item: Difference) -> dict[str, object]:
    # The column in the file keeps its name, since scripts rely on it.
    columns = {"figure" if name == "quantity" else name: value for name, value in asdict(item).items()}
    del columns["interval"]
    ends = {"change_low": item.interval.low, "change_high": item.interval.high} if item.interval else {}
    return columns | {"change_low": None, "change_high": None} | ends | {"difference": item.verdict}
