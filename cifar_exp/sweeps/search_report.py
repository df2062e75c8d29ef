"""The end of a search: the table of trials, the best one's command line, and what made the difference."""

import csv
import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar_exp.sweeps.search_study import EPOCHS, REASON, SECONDS, TEST_ACCURACY, SearchStudy
from cifar_exp.system.atomic_files import write_atomically
from cifar_exp.system.process import uv_prefix
from cifar_exp.system.redaction import masked

TABLE_FILE = "search.csv"
Metrics = list[tuple[str, float, int]]


def best_of(trials: Sequence[Any]) -> Any | None:
    """The completed trial with the highest validation accuracy; None if none completed."""
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    return max(complete, key=lambda trial: (trial.value, -trial.number), default=None)


def report(study: SearchStudy, sweep_dir: Path, quiet: bool) -> tuple[Metrics, list[Path]]:
    """Print the results of the study so far and write ``search.csv``.

    Returns:
        Metrics for the parent run, with the number of the trial as their step, and files for it.
    """
    from cifar_exp.system.terminal import Terminal

    console = Terminal(quiet=quiet)
    trials = study.trials()
    names = list(study.space.searched)
    _print_table(console, trials, names)
    table = sweep_dir / TABLE_FILE
    write_atomically(table, _csv(trials, names))
    best = best_of(trials)
    if best is None:
        console.print("no trial completed, so there is no best one")
        return [], [table]
    for line in _conclusion(study, trials, best):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"written: {table}", highlight=False, soft_wrap=True)
    return _metrics(trials), [table]


def _conclusion(study: SearchStudy, trials: Sequence[Any], best: Any) -> list[str]:
    complete = sum(trial.state.name == "COMPLETE" for trial in trials)
    lines = [
        f"best: trial {best.number}, validation accuracy {best.value:.4f}. It is the highest of {complete}, so expect "
        f"somewhat less of another run"
        + (f"; its test accuracy is {best.user_attrs[TEST_ACCURACY]:.4f}" if TEST_ACCURACY in best.user_attrs else ""),
        f"run it: {command(study, best)}",
    ]
    if shares := study.importances():
        shown = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        lines.append(f"share of each setting in the differences (fANOVA, {complete} trials): {shown}")
    return lines


def command(study: SearchStudy, trial: Any) -> str:
    """The command line that trains with the settings of a trial."""
    fixed = masked([word for word in study.space.fixed if not word.startswith(("resume=", "progress="))])
    words = [*fixed, *(f"{name}={trial.params[name]}" for name in study.space.searched)]
    return f"{uv_prefix()}cifar-exp {shlex.join(words)}"


def _metrics(trials: Sequence[Any]) -> Metrics:
    """``search/val_accuracy`` of each completed trial, and the best so far."""
    metrics: Metrics = []
    best = 0.0
    for trial in trials:
        if trial.state.name == "COMPLETE":
            best = max(best, trial.value)
            metrics += [
                ("search/val_accuracy", trial.value, trial.number),
                ("search/best_val_accuracy", best, trial.number),
            ]
    return metrics


def _cells(trial: Any, names: Sequence[str]) -> list[Any]:
    facts = trial.user_attrs
    accuracy = trial.value if trial.value is not None else trial.intermediate_values.get(trial.last_step or 0)
    return [
        trial.number,
        *(trial.params.get(name, "") for name in names),
        {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}.get(trial.state.name, ""),
        accuracy,
        facts.get(TEST_ACCURACY),
        facts.get(EPOCHS),
        facts.get(SECONDS),
        facts.get(REASON, ""),
    ]


HEADINGS = ("result", "val_accuracy", "test_accuracy", "epochs", "seconds", "reason")


def _print_table(console: Any, trials: Sequence[Any], names: Sequence[str]) -> None:
    """The table without the reasons, which were printed when they came up and are in ``search.csv``."""
    from rich.table import Table

    short = [name.rpartition(".")[2] for name in names]
    shown = short if len(set(short)) == len(short) else list(names)
    columns = ("trial", *shown, "result", "val acc", "test acc", "epochs", "seconds")
    table = Table(*columns, title="Trials", title_justify="left")
    forms = ["d", *[".4g"] * len(names), "", ".4f", ".4f", "d", ".0f"]
    for trial in trials:
        cells = zip(_cells(trial, names)[:-1], forms, strict=True)
        table.add_row(
            *(format(cell, form) if isinstance(cell, int | float) else str(cell or "") for cell, form in cells)
        )
    console.print(table)


def _csv(trials: Sequence[Any], names: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", *names, *HEADINGS])
    writer.writerows(_cells(trial, names) for trial in trials)
    return text.getvalue()
