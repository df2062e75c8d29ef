"""`cifar-exp report`: recreate the tables and figures of a sweep, or compare two sweeps, from folders or MLflow."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from rich.console import Console

from cifar_exp.cli.words import settings_in
from cifar_exp.config.schema import ReportSettings
from cifar_exp.errors import ConfigError, storage_errors
from cifar_exp.records.find_run import find_folder
from cifar_exp.records.run_folder import RUN_FILE, Outcome, RunInfo
from cifar_exp.study.comparison import Comparison
from cifar_exp.study.finished_runs import FinishedRun, finished_runs
from cifar_exp.study.report import Study
from cifar_exp.system.surroundings import settle

SETTINGS = ("tracking.uri", "report.target_accuracy", "report.price_per_hour")


@click.command("report")
@click.argument("words", nargs=-1, required=True, metavar="SWEEP [SWEEP]")
@click.option(
    "--to", type=click.Path(path_type=Path), default=Path(), help="Output folder (default: the current folder)."
)
def command(words: tuple[str, ...], to: Path) -> None:
    """Recreate the tables and figures of SWEEP, or compare two sweeps.

    SWEEP is a sweep's folder, its MLflow run id, or `latest`.

    \b
    tracking.uri=<address>           the MLflow store to read (default: the one under outputs/)
    report.target_accuracy=0.85      report the time to this validation accuracy
    report.price_per_hour=2.5        price of one device, to report the cost of that time
    """
    settle()
    typed, sweeps = settings_in(words, SETTINGS)
    target = _number(typed, "report.target_accuracy", highest=1.0)
    price = _number(typed, "report.price_per_hour", highest=math.inf)
    if not 1 <= len(sweeps) <= 2:
        raise ConfigError(f"report: it takes one sweep, or two to compare. {len(sweeps)} were given")
    found = [finished_runs(sweep, typed.get("tracking.uri")) for sweep in sweeps]
    settings = _settings(found[0], target, price)
    made = _comparison(sweeps, found) if len(found) == 2 else _study(sweeps[0], found[0], settings)
    made.print(Console())
    with storage_errors(to, "Set --to to another folder"):
        to.mkdir(parents=True, exist_ok=True)
    print("\n".join(str(path) for path in made.write(to)))


def _number(typed: Mapping[str, str], name: str, highest: float) -> float | None:
    """Parse a setting in (0, ``highest``]; None if it is not set."""
    if name not in typed:
        return None
    try:
        number = float(typed[name])
    except ValueError:
        number = math.nan
    if not 0 < number <= highest or number == math.inf:
        limit = " and at most 1" if highest == 1 else ""
        raise ConfigError(f"{name}={typed[name]}: it must be a number over 0{limit}. Set {name}=0.85")
    return number


def _settings(
    runs: Sequence[FinishedRun], target_accuracy: float | None, price_per_hour: float | None
) -> ReportSettings:
    """The settings of the command line; for those not given, the settings of the sweep."""
    given = runs[0].params if runs else {}
    then = [given.get(f"report.{name}") for name in ("target_accuracy", "price_per_hour")]
    target, price = (None if value in (None, "None") else float(value) for value in then)
    return ReportSettings(target_accuracy or target, price_per_hour or price)


def _study(sweep: str, runs: Sequence[FinishedRun], settings: ReportSettings) -> Study:
    study = Study.of(runs, settings, _unfinished(find_folder(sweep) or Path(sweep)))
    if study is None:
        raise ConfigError(
            f"{sweep}: a speedup needs finished runs with at least two device counts, found {len(runs)} run(s). Run "
            f"cifar-exp -m experiment=speedup devices.count=1,2"
        )
    return study


def _unfinished(folder: Path) -> list[str]:
    """A line for each unfinished job of the sweep in ``folder``."""
    jobs = []
    for path in sorted(folder.rglob(RUN_FILE)) if folder.is_dir() else ():
        outcome = Outcome.of(path.parent)
        if outcome is None or outcome.status != "FINISHED":
            overrides = RunInfo.load(path.parent).tags.get("overrides", path.parent.name)
            jobs.append(f"{overrides}: {outcome.status if outcome else 'not finished'}")
    return jobs


def _comparison(sweeps: Sequence[str], runs: Sequence[Sequence[FinishedRun]]) -> Comparison:
    first, second = (Path(sweep).name[:20] for sweep in sweeps)
    names = (f"A: {first}", f"B: {second}")
    return Comparison.of(names, *runs)
