"""The command that makes a sweep's report again, or compares two sweeps, from their folders or from MLflow."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cifar_exp.config.schema import Report
from cifar_exp.errors import CifarExpError, ConfigError, storage_errors
from cifar_exp.records.find_run import find_folder
from cifar_exp.records.run_folder import RUN_FILE, Outcome, RunInfo
from cifar_exp.study.comparison import Comparison
from cifar_exp.study.finished_runs import FinishedRun, finished_runs
from cifar_exp.study.report import Study
from cifar_exp.system.redaction import masked_text


def main() -> None:
    """The command `cifar-exp-report`."""
    parser = argparse.ArgumentParser(
        prog="cifar-exp-report", description="Make a sweep's speedup table and figure again, or compare two sweeps."
    )
    parser.add_argument(
        "sweeps", nargs="+", help="one or two sweeps: a folder under outputs/multirun, the parent run's id, or latest"
    )
    parser.add_argument("--uri", help="read MLflow at this tracking address, folders too (default: under outputs/)")
    parser.add_argument("--to", type=Path, default=Path(), help="folder for what is written (default: here)")
    parser.add_argument("--target-accuracy", type=float, help="what it took to reach it, 0 to 1, as 0.85")
    parser.add_argument("--price-per-hour", type=float, help="of one device, for the price of reaching it")
    arguments = parser.parse_args()
    try:
        _check(arguments.target_accuracy, arguments.price_per_hour)
        if len(arguments.sweeps) > 2:
            raise ConfigError(f"{' '.join(arguments.sweeps)}: one sweep is shown, or two are compared. Type two")
        found = [finished_runs(sweep, arguments.uri) for sweep in arguments.sweeps]
        compare = len(found) == 2
        settings = _settings(found[0], arguments.target_accuracy, arguments.price_per_hour)
        made = _comparison(arguments.sweeps, found) if compare else _study(arguments.sweeps[0], found[0], settings)
        made.print(Console())
        with storage_errors(arguments.to, "Type --to with another folder"):
            arguments.to.mkdir(parents=True, exist_ok=True)
        print("\n".join(str(path) for path in made.write(arguments.to)))
    except CifarExpError as error:
        print(f"cifar-exp-report: {masked_text(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)


def _check(target_accuracy: float | None, price_per_hour: float | None) -> None:
    if target_accuracy is not None and not 0 < target_accuracy <= 1:
        raise ConfigError(
            f"--target-accuracy={target_accuracy}: it must be more than 0 and at most 1. Type --target-accuracy=0.85"
        )
    if price_per_hour is not None and not 0 < price_per_hour < float("inf"):
        raise ConfigError(f"--price-per-hour={price_per_hour}: it must be more than 0. Type --price-per-hour=2.5")


def _settings(runs: Sequence[FinishedRun], target_accuracy: float | None, price_per_hour: float | None) -> Report:
    """What was typed, else what the sweep itself was given."""
    given = runs[0].params if runs else {}
    then = [given.get(f"report.{name}") for name in ("target_accuracy", "price_per_hour")]
    target, price = (None if value in (None, "None") else float(value) for value in then)
    return Report(target_accuracy or target, price_per_hour or price)


def _study(sweep: str, runs: Sequence[FinishedRun], settings: Report) -> Study:
    study = Study.of(runs, settings, _unfinished(find_folder(sweep) or Path(sweep)))
    if study is None:
        raise ConfigError(
            f"{sweep}: a speedup needs finished runs with at least two device counts, found {len(runs)} run(s). Type "
            f"cifar-exp -m experiment=speedup devices.count=1,2"
        )
    return study


def _unfinished(folder: Path) -> list[str]:
    """The jobs of the sweep in ``folder`` that are not finished."""
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
