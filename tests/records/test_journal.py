"""The journal is read as it was written, also while it grows and after a crash."""

import json
import math
from pathlib import Path

import pytest

from cifar_exp.errors import StorageError
from cifar_exp.records.journal import JOURNAL_FILE, Entry, JournalReader, JournalWriter, last_values, parse, read
from tests.helpers.marks import linux

FIRST = Entry(0, 0, 0.25, {"a": 1.0})
SECOND = Entry(195, 1, 12.5, {"train/loss": 1.25, "val/accuracy": 0.1, "epoch": 1})

THIRD = Entry(390, 2, 25.0, {"train/loss": 1.0, "val/accuracy": 0.2, "epoch": 2})


def written(run_dir: Path, *entries: Entry) -> None:
    writer = JournalWriter(run_dir)
    for entry in entries:
        writer.write(entry)
    writer.close()


def test_journal_round_trip(tmp_path: Path) -> None:
    third = Entry(196, 2, 13.0, {"train/loss": 0.1 + 0.2, "tiny": 1e-300, "large": 2.0**60})
    written(tmp_path, FIRST, SECOND, third)
    assert read(tmp_path) == [FIRST, SECOND, third]


def test_journal_line_has_the_documented_fields(tmp_path: Path) -> None:
    written(tmp_path, Entry(3, 1, 1.23456789, {"train/loss": 0.5}))
    text = (tmp_path / JOURNAL_FILE).read_text()
    assert text.endswith("\n")
    assert json.loads(text) == {"step": 3, "epoch": 1, "time": 1.2346, "metrics": {"train/loss": 0.5}}


def test_nan_and_infinity_survive_and_every_line_is_strict_json(tmp_path: Path) -> None:
    written(tmp_path, Entry(1, 1, 0.0, {"nan": math.nan, "up": math.inf, "down": -math.inf, "fine": 1.0}))

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    json.loads((tmp_path / JOURNAL_FILE).read_text(), parse_constant=refuse)
    (entry,) = read(tmp_path)
    assert math.isnan(entry.metrics["nan"])
    assert (entry.metrics["up"], entry.metrics["down"], entry.metrics["fine"]) == (math.inf, -math.inf, 1.0)


def test_an_entry_is_on_disk_before_the_writer_is_closed(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path)
    writer.write(FIRST)
    assert read(tmp_path) == [FIRST]
    writer.close()


def test_second_writer_appends(tmp_path: Path) -> None:
    """The parent's closing line follows the ranks' entries."""
    written(tmp_path, FIRST)
    written(tmp_path, SECOND)
    assert read(tmp_path) == [FIRST, SECOND]


def test_a_follower_yields_each_entry_once(tmp_path: Path) -> None:
    follower = JournalReader(tmp_path)
    assert list(follower.new_entries()) == []  # no journal yet
    written(tmp_path, FIRST)
    assert list(follower.new_entries()) == [FIRST]
    assert list(follower.new_entries()) == []
    written(tmp_path, SECOND, THIRD)
    assert list(follower.new_entries()) == [SECOND, THIRD]


def test_partial_line_is_read_once_it_is_complete(tmp_path: Path) -> None:
    written(tmp_path, FIRST, SECOND)
    path = tmp_path / JOURNAL_FILE
    whole = path.read_bytes()
    second_line = whole.index(b"\n") + 1
    for cut in range(second_line, len(whole)):
        path.write_bytes(whole[:cut])
        follower = JournalReader(tmp_path)
        assert list(follower.new_entries()) == [FIRST]
        path.write_bytes(whole)
        assert list(follower.new_entries()) == [SECOND]


def test_partial_line_of_a_killed_writer_does_not_damage_the_next(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL_FILE
    written(tmp_path, FIRST)
    follower = JournalReader(tmp_path)
    with path.open("a") as file:
        file.write('{"step": 7, "ep')
    assert list(follower.new_entries()) == [FIRST]
    written(tmp_path, SECOND)
    assert list(follower.new_entries()) == [SECOND]
    assert read(tmp_path) == [FIRST, SECOND]


@pytest.mark.parametrize("kind", [str, bytes])
def test_a_line_is_read_as_text_and_as_bytes(kind: type[str | bytes]) -> None:
    line = '{"step": 2, "epoch": 1, "time": 0.5, "metrics": {"loss": "nan", "lr": 1}}'
    entry = parse(line if kind is str else line.encode())
    assert (entry.step, entry.epoch, entry.time, entry.metrics["lr"]) == (2, 1, 0.5, 1.0)
    assert math.isnan(entry.metrics["loss"])


def test_last_values_are_the_latest_of_every_metric(tmp_path: Path) -> None:
    assert last_values(tmp_path) == {}
    written(tmp_path, Entry(1, 1, 0, {"a": 1, "b": 2}), Entry(2, 1, 1, {"b": 3, "c": 4}), Entry(3, 2, 2, {"a": 5}))
    assert last_values(tmp_path) == {"a": 5, "b": 3, "c": 4}


def test_step_in_the_journal_is_not_written_again(tmp_path: Path) -> None:
    """A resumed run repeats steps that are already in the journal."""
    written(tmp_path, FIRST, SECOND)
    rest = Entry(195, 1, 30.0, {"train/loss": 1.5, "lr": 0.1})
    written(tmp_path, FIRST, rest, THIRD)
    assert read(tmp_path) == [FIRST, SECOND, Entry(195, 1, 30.0, {"lr": 0.1}), THIRD]


@linux
def test_full_disk_is_reported_at_the_write_and_at_close(tmp_path: Path) -> None:
    """A line that could not be written stays in the buffer, and fails again when the file is closed."""
    writer = JournalWriter(tmp_path)
    writer._file = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(StorageError, match="cannot be written: No space left on device"):
        writer.write(FIRST)
    with pytest.raises(StorageError, match="cannot be written: No space left on device"):
        writer.close()
