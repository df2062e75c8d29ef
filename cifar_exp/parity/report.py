"""The report of a parity check: tables in the terminal, ``parity.md`` to read, ``parity.json`` for programs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from cifar_exp.errors import FREE_SPACE, storage_errors
from cifar_exp.parity.checks import Check, Subject
from cifar_exp.system.atomic_files import write_atomically, write_json

REPORT_FILES = ("parity.md", "parity.json")
FAILED = "DOES NOT HOLD"
TITLES = {
    "images": "The same images in the same order",
    "gradients": "The same gradients, losses and steps",
    "evaluation": "Every test image counted once",
}
METHOD = """\
N ranks are compared with one rank that accumulates the gradients of their micro-batches, as `train.accumulate` does. So
each batch norm sees the same images. (With `train.batch_norm=synchronized` batch norm sees the images of all ranks;
then the one rank trains on them as one batch.) N = 1 is the same measurement twice: it shows what this machine does not
reproduce."""
HOW = {
    "images": """\
The images of one epoch are compared by sha256 as the network gets them: augmented, normalised, with their labels. In
each step the micro-batch of rank r must be the r-th of the single rank. Before augmentation the images are counted: in
an epoch none is repeated, all belong to the training set, and only the images of the last partial step are left
out.""",
    "gradients": """\
Both train the first steps of the run from the same initial values. After each step both continue with the single rank's
parameters, so that rounding errors do not grow. *Gradient*: as the optimizer gets it; the norm of the largest
difference of a tensor / the norm of the whole gradient. *Loss*: the mean over all ranks; the largest relative
difference. *Parameters*: the distance between both networks after a step / the length of the step; the largest. They
need not agree bit for bit, since the ranks' gradients are summed in another order. {rounding} The parameters of all
ranks must agree bit for bit.""",
    "evaluation": """\
Both evaluate the single rank's network after these steps on the test set. The images of the ranks, joined in the order
of the ranks, must be those of the test set by sha256: none is missing, repeated or added as padding. *Accuracy*: the
difference. *Loss*: the relative difference.""",
}


@dataclass(frozen=True)
class ParityResult:
    """The checks for one number of ranks.

    Attributes:
        ranks: the number of ranks.
        devices: in words.
        checks: the same ones for each number of ranks.
        figures: further measurements for the JSON file.
    """

    ranks: int
    devices: str
    checks: Sequence[Check]
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class ParityReport:
    """The results of a parity check.

    Attributes:
        title: network and data in a few words.
        command: as it was typed, without secrets.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        rounding: the allowed rounding error, in words.
        about: what was checked and where, as names and texts.
        settings: the resolved configuration, without secrets.
        results: one for each number of ranks.
    """

    title: str
    command: str
    precision: str
    rounding: str
    about: Mapping[str, str]
    settings: Mapping[str, Any]
    results: Sequence[ParityResult]

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        return all(check.holds for result in self.results for check in result.checks)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.holds:
            return f"{listed([result.ranks for result in self.results])} compute what one rank computes"
        failed = [
            f"{listed([result.ranks])}: {check.name} ({check.found}, must be {check.wanted})"
            for result in self.results
            for check in result.checks
            if not check.holds
        ]
        return f"{FAILED}: {failed[0]}" + (f", and {len(failed) - 1} more" if failed[1:] else "")

    def print(self, console: Console) -> None:
        """Print a table for each subject."""
        for subject in get_args(Subject):
            headings, *rows = self._cells(subject)
            table = Table(title=TITLES[subject], title_justify="left")
            for place, heading in enumerate(headings):
                table.add_column(heading, justify="right" if place > 1 else "left")
            for row in rows:
                table.add_row(*row, style="red" if any(FAILED in cell for cell in row) else None)
            console.print(table)

    def write(self, folder: Path) -> Path:
        """Write ``parity.md`` and ``parity.json`` to ``folder``. Returns the path of ``parity.md``.

        Raises:
            StorageError: a file cannot be written.
        """
        page, figures = (folder / name for name in REPORT_FILES)
        with storage_errors(folder, FREE_SPACE):
            write_json(figures, self.content())
            write_atomically(page, self.markdown())
        return page

    def content(self) -> dict[str, Any]:
        """All figures as plain values; None for values that are not finite, which JSON lacks."""
        return {
            "title": self.title,
            "holds": self.holds,
            "verdict": self.verdict,
            "command": self.command,
            "precision": self.precision,
            "rounding": self.rounding,
            "about": dict(self.about),
            "results": [
                {
                    "ranks": result.ranks,
                    "devices": result.devices,
                    "holds": all(check.holds for check in result.checks),
                    "checks": [_plain(check) for check in result.checks],
                    **result.figures,
                }
                for result in self.results
            ],
            "settings": self.settings,
        }

    def markdown(self) -> str:
        """The report as Markdown."""
        about = _table([["", ""], *([name, text] for name, text in self.about.items())])
        parts = [
            f"# Do N ranks compute what one computes? {self.title}",
            f"**{self.verdict}.**",
            f"`{self.command}`",
            about,
            METHOD,
        ]
        for subject in get_args(Subject):
            how = HOW[subject].replace("{rounding}", self.rounding)
            parts += [f"## {TITLES[subject]}", fill(how, 120), _table(self._cells(subject)), *self._details(subject)]
        return "\n\n".join(parts) + "\n"

    def _cells(self, subject: Subject) -> list[list[str]]:
        """Headings, then a row of texts a check: its limit, and its value for each number of ranks."""
        columns = [[check for check in result.checks if check.subject == subject] for result in self.results]
        rows = [
            [checks[0].name, _common([check.wanted for check in checks]), *map(_cell, checks)]
            for checks in zip(*columns, strict=True)
        ]
        return [["check", "must be", *(listed([result.ranks]) for result in self.results)], *rows]

    def _details(self, subject: Subject) -> list[str]:
        """Details of the checks as a Markdown list."""
        ranks: dict[tuple[str, str], list[int]] = {}
        for result in self.results:
            for check in result.checks:
                if check.subject == subject and check.detail:
                    ranks.setdefault((check.name, check.detail), []).append(result.ranks)
        lines = [f"- {name}, {listed(counts)}: {detail}" for (name, detail), counts in ranks.items()]
        return ["\n".join(lines)] if lines else []


def _plain(check: Check) -> dict[str, Any]:
    measured = check.measured if math.isfinite(check.measured) else None
    return asdict(check) | {"measured": measured, "holds": check.holds}


def _cell(check: Check) -> str:
    return f"{check.found}, {'holds' if check.holds else FAILED}"


def _common(texts: Sequence[str]) -> str:
    """A single text if all are equal, else all of them."""
    return ", ".join(dict.fromkeys(filter(None, texts))) if len(set(texts)) == 1 else ", ".join(texts)


def listed(counts: Sequence[int]) -> str:
    """For example ``1, 2 and 4 ranks``."""
    words = [*map(str, counts)]
    listed = f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]
    return f"{listed} rank{'s'[: counts != [1]]}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the headings."""
    headings, *cells = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([headings, f"|{'---|' * len(rows[0])}", *cells])
