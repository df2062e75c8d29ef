"""Run a case, and the table of results."""

import json
import shutil
import subprocess
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tests.faults.registry import Case
from tests.faults.scene import Scene, Suite


@dataclass(frozen=True)
class Row:
    """One fault of the table.

    Attributes:
        fault: its name.
        times: how often to try it; 0 if it cannot be tried here.
        handled: how often all checks after it passed.
        next_start: what the next start did, or why the fault was not tried.
        problem: the first check that failed.
    """

    fault: str
    times: int
    handled: int
    next_start: str
    problem: str = ""

    def line(self) -> str:
        if not self.times:
            return f"{self.fault}: {self.next_start}"
        return f"{self.fault}: {self.handled} of {self.times} handled; {self.next_start}"


def run_case(case: Case, suite: Suite) -> list[Row]:
    """Inject a case's faults; returns a row for each. If all were handled, the case's folder is removed."""
    if reason := case.not_run():
        return [Row(fault, 0, 0, f"NOT RUN: {reason}") for fault in case.faults]
    times = suite.repeat if case.racy else 1
    scene = Scene(suite.base / case.name, suite, case.name, times)
    problem = ""
    try:
        case.function(scene)
        scene.check_files()
    except (Exception, subprocess.TimeoutExpired) as error:  # any exception means a fault was not handled
        brief = f"{type(error).__name__}: {error}" if isinstance(error, AssertionError) else traceback.format_exc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{brief}\n({place.filename}:{place.lineno}; folder {scene.base})"
    finally:
        scene.close()
    if not problem:
        shutil.rmtree(scene.base, ignore_errors=True)
    rows = [
        Row(fault, times, scene.count[fault], scene.next_start.get(fault, ""), problem)
        if problem and scene.count[fault] < times
        else Row(fault, times, scene.count[fault], scene.next_start.get(fault, ""))
        for fault in case.faults
    ]
    if problem and not any(row.problem for row in rows):  # a check after the last fault failed
        last = rows[-1]
        rows[-1] = Row(last.fault, last.times, last.handled - 1, last.next_start, problem)
    return rows


def totals(rows: Sequence[Row]) -> str:
    """All results in one line."""
    tried = [row for row in rows if row.times]
    handled = [row for row in tried if row.handled == row.times and not row.problem]
    left = f"; {len(rows) - len(tried)} NOT RUN" if len(tried) < len(rows) else ""
    injected = sum(row.handled for row in tried)
    return f"{len(handled)} of {len(tried)} faults handled, {injected:,} injections in all{left}"


def as_markdown(rows: Sequence[Row], suite: Suite) -> str:
    """The table as Markdown with aligned columns."""
    cells = [(row.fault, str(row.times or "-"), str(row.handled if row.times else "-"), row.next_start) for row in rows]
    head = ("fault", "times", "handled", "the next start")
    widths = [max(len(line[column]) for line in [head, *cells]) for column in range(4)]

    def line(values: Sequence[str]) -> str:
        return f"| {' | '.join(value.ljust(width) for value, width in zip(values, widths, strict=True))} |"

    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([line(head), rule, *map(line, cells), "", f"{totals(rows)}; seed {suite.seed}", ""])


def as_json(rows: Sequence[Row], suite: Suite) -> str:
    """The table as JSON, with problems."""
    document = {
        "seed": suite.seed,
        "repeat": suite.repeat,
        "time": round(time.time()),
        "faults": [asdict(r) for r in rows],
    }
    return json.dumps(document, indent=1) + "\n"
