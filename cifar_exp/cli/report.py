"""`cifar-exp report`: a sweep's tables and figures again, or two sweeps compared; from folders or from MLflow."""

import math
from collections.abc import Mapping
from pathlib import Path

import click

from cifar_exp.cli.words import settings_in
from cifar_exp.errors import ConfigError, storage_errors

SETTINGS = ("tracking.uri", "report.target_accuracy", "report.price_per_hour")


@click.command("report")
@click.argument("words", nargs=-1, required=True, metavar="SWEEP [SWEEP]")
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Folder for the report's files (default: the current folder).",
)
def command(words: tuple[str, ...], to: Path) -> None:
    """Make the tables and figures of SWEEP again, or compare two sweeps.

    SWEEP is a sweep's folder, its MLflow run id, or `latest`.

    \b
    tracking.uri=<address>           the MLflow store to read (default: the one under outputs/)
    report.target_accuracy=0.85      report the time to this validation accuracy
    report.price_per_hour=2.5        price per device and hour, to report its cost
    """
    from cifar_exp.study.sweep_report import compared_sweeps, sweep_report
    from cifar_exp.system.surroundings import set_up_environment
    from cifar_exp.system.terminal import Terminal

    set_up_environment()
    typed, sweeps = settings_in(words, SETTINGS)
    target = _number(typed, "report.target_accuracy", highest=1.0)
    price = _number(typed, "report.price_per_hour", highest=math.inf)
    if not 1 <= len(sweeps) <= 2:
        raise ConfigError(
            f"report: it takes one sweep, or two to compare, and {len(sweeps)} were given. Set one or two, as in "
            f"cifar-exp report latest"
        )
    uri = typed.get("tracking.uri")
    made = compared_sweeps(sweeps, uri) if len(sweeps) == 2 else sweep_report(sweeps[0], uri, target, price)
    made.print(Terminal())
    with storage_errors(to, "Set --to to another folder"):
        to.mkdir(parents=True, exist_ok=True)
    print("\n".join(str(path) for path in made.write(to)))


def _number(typed: Mapping[str, str], name: str, highest: float) -> float | None:
    """A setting that must be more than 0 and at most ``highest``; None if it was not set."""
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
