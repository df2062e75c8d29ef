"""The journal ``metrics.jsonl`` of all metrics of a run, one JSON object a line.

Only a partial last line is ever removed.

``{"step": int, "epoch": int, "time": seconds since the start of the run, "metrics": {name: value}}``

Rank 0 appends while it trains. The parent appends the last line after the ranks have ended. Other processes only read.
A sweep's parent run rewrites its own journal.

A session is the time from one start of the command to its end. A resumed run has several.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cifar_exp.errors import FREE_SPACE, StorageError, storage_errors
from cifar_exp.system import foreign_files
from cifar_exp.system.atomic_files import force_to_disk

JOURNAL_FILE = "metrics.jsonl"
RUN_ID_FILE = "mlflow_run_id"
LONGEST_LINE = 2**20  # bytes; a line of a run on 1,000 ranks has about 300,000
MOST_BYTES = 2**28  # of a journal that is read at once; a line has about 300
_RUN_ID = re.compile(r"[\w-]{1,64}")


@dataclass(frozen=True)
class Entry:
    """One line of the journal.

    Attributes:
        step: completed training steps.
        epoch: the current epoch, counted from 1; 0 before the first one.
        time: seconds since the start of the run.
        metrics: values by name.
    """

    step: int
    epoch: int
    time: float
    metrics: Mapping[str, float]


class JournalWriter:
    """Appends entries; each is flushed to the operating system at once.

    A resumed run repeats the steps after its checkpoint. Steps that the journal already has are not written twice.
    """

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / JOURNAL_FILE
        with storage_errors(path, FREE_SPACE):
            _drop_partial_line(path)
            self._written = {name: entry.step for entry in read(run_dir) for name in entry.metrics}
            self._file = path.open("a", encoding="utf-8")

    def write(self, entry: Entry) -> None:
        """Append one entry. JSON has no NaN or infinity, so they are written as strings that ``float`` can read.

        Raises:
            StorageError: a file cannot be written.
        """
        metrics = {
            name: value if math.isfinite(value) else str(value)
            for name, value in entry.metrics.items()
            if entry.step > self._written.get(name, -1)
        }
        if not metrics:
            return
        line = {"step": entry.step, "epoch": entry.epoch, "time": round(entry.time, 4), "metrics": metrics}
        with storage_errors(Path(self._file.name), FREE_SPACE):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Force the journal to disk, so that it survives a crash of the machine.

        Raises:
            StorageError: the file cannot be written, or was deleted.
        """
        with storage_errors(Path(self._file.name), FREE_SPACE):
            if os.fstat(self._file.fileno()).st_nlink == 0:
                raise StorageError(f"{self._file.name} was deleted while the run was training. Start the run again")
            force_to_disk(self._file.fileno())

    def close(self) -> None:
        """Write the buffered lines and close the file.

        Raises:
            StorageError: the lines cannot be written; the file is closed nevertheless.
        """
        with storage_errors(Path(self._file.name), FREE_SPACE):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _drop_partial_line(path: Path) -> None:
    """Remove the partial last line of a killed writer, which would corrupt the next line. Readers have ignored it."""
    if path.exists():
        foreign_files.opened(path, MOST_BYTES).close()
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def parse(line: str | bytes) -> Entry:
    """The entry in one line of the journal.

    Raises:
        ValueError: the line is no entry.
    """
    try:
        fields: dict[str, Any] = foreign_files.from_json(line)
        metrics = {name: float(value) for name, value in fields["metrics"].items()}
        entry = Entry(fields["step"], fields["epoch"], float(fields["time"]), metrics)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"it is not a journal entry: {error!r}") from error
    if not (type(entry.step) is type(entry.epoch) is int and 0 <= entry.step < 2**53 and 0 <= entry.time < 2**40):
        raise ValueError(f"it is not a journal entry: step {entry.step!r}, epoch {entry.epoch!r}, time {entry.time!r}")
    return entry


class JournalReader:
    """Reads a journal while it grows; a partial line waits for the next call."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / JOURNAL_FILE
        self._offset = 0

    def new_entries(self) -> Iterator[Entry]:
        """The complete lines since the last call; none where there is no journal yet."""
        if not self._path.exists():
            return
        with foreign_files.opened(self._path, math.inf) as file:
            file.seek(self._offset)
            while (line := file.readline(LONGEST_LINE)).endswith(b"\n"):
                self._offset += len(line)
                yield parse(line)
            if len(line) == LONGEST_LINE:
                raise ValueError(f"a line is longer than {LONGEST_LINE:,} bytes")


def read(run_dir: Path) -> list[Entry]:
    """All complete lines of the run's journal, in order.

    Raises:
        StorageError: it is damaged, not a regular file, or too large.
    """
    path = run_dir / JOURNAL_FILE
    entries: list[Entry] = []
    try:
        if path.exists():
            foreign_files.opened(path, MOST_BYTES).close()
        entries.extend(JournalReader(run_dir).new_entries())
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{path}: the journal cannot be read after {len(entries)} lines: {error}. Restore that file, or set "
            f"resume=never for a new run"
        ) from error
    return entries


def last_values(run_dir: Path) -> dict[str, float]:
    """The last value of every metric in the run's journal."""
    metrics: dict[str, float] = {}
    for entry in read(run_dir):
        metrics |= entry.metrics
    return metrics


def run_id(folder: Path) -> str | None:
    """The tracker's id of the run or sweep in ``folder``; None if no tracker has opened it yet."""
    path = folder / RUN_ID_FILE
    if not path.exists():
        return None
    found = foreign_files.read_text(path).strip()
    return found if _RUN_ID.fullmatch(found) else None
