"""An untrusted run folder: nothing outside it is read or written, and no file in it crashes the program."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cifar_exp.config import limited_yaml
from cifar_exp.config.stored import stored_config
from cifar_exp.errors import StorageError
from cifar_exp.records import journal
from cifar_exp.records.find_run import find_run
from cifar_exp.records.folder_check import FILES, check_folder, check_job_folders
from cifar_exp.records.run_folder import Outcome, RunInfo, lock_run_folder
from cifar_exp.records.run_identity import claimed
from cifar_exp.study.finished_runs import folder_run
from cifar_exp.system import foreign_files
from cifar_exp.system.atomic_files import write_atomically

LINE = '{"step": 1, "epoch": 1, "time": 1.0, "metrics": {"loss": 0.5}}\n'
FACTS: dict[str, Any] = {"name": "a run", "params": {}, "tags": {}, "started": 1.0, "config_hash": "ab"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(FACTS))
    (folder / "metrics.jsonl").write_text(LINE)
    return folder


def as_link(path: Path) -> None:
    path.unlink(missing_ok=True)
    outside = path.parents[1] / "outside"
    outside.write_text("precious")
    path.symlink_to(outside)


def as_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def as_socket(path: Path) -> None:
    path.unlink(missing_ok=True)
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


KINDS = {"link": as_link, "FIFO": as_fifo, "socket": as_socket}
USES: dict[str, Callable[[Path], object]] = {
    "predict, resume": lambda folder: find_run(str(folder)),
    "report": folder_run,
    "train, sync": lock_run_folder,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_link_and_a_special_file_are_refused_wherever_a_run_is_used(run: Path, kind: str, use: str) -> None:
    for name in (*sorted(FILES - {"run.json"}), "cifar-exp.log", ".run.json.cifar-exp-tmp"):
        KINDS[kind](run / name)
        with pytest.raises(StorageError, match=name) as refusal:
            USES[use](run)
        assert ("Put a copy in its place" if kind == "link" else "Remove it") in str(refusal.value)
        (run / name).unlink()
    if kind == "link":
        assert (run.parent / "outside").read_text() == "precious"


@pytest.mark.parametrize("name", ["checkpoints", ".hydra"])
def test_links_in_a_run_folder_are_refused(run: Path, name: str) -> None:
    elsewhere = run.parent / "elsewhere"
    elsewhere.mkdir()
    (run / name).rmdir() if (run / name).exists() else None
    (run / name).symlink_to(elsewhere)
    with pytest.raises(StorageError, match=f"{name}: it is a link"):
        check_folder(run)
    (run / name).unlink()
    (run / name).mkdir()
    as_link(run / name / "step-any.json")
    with pytest.raises(StorageError, match=r"any\.json: it is a link"):
        check_folder(run)


def test_other_files_in_a_run_folder_are_left_unchanged(run: Path) -> None:
    (run / "data").symlink_to("/")
    as_fifo(run / "pipe")
    (run / "notes.txt").symlink_to("/etc/hostname")
    check_folder(run)
    assert find_run(str(run)) == run


def test_control_characters_of_a_name_and_of_a_links_target_are_escaped(run: Path) -> None:
    (run / "\x1b[2J.log").symlink_to("/a\nb")
    with pytest.raises(StorageError) as refusal:
        check_folder(run)
    assert "\\x1b[2J.log: it is a link to /a\\nb." in str(refusal.value)


def test_jobs_of_a_sweep_are_continued_in_its_own_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "sweep" / "1").mkdir(parents=True)
    check_job_folders(tmp_path / "sweep")
    (tmp_path / "sweep" / "0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="sweep/0: it is a link"):
        check_job_folders(tmp_path / "sweep")


def test_a_temporary_file_that_is_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("precious")
    (tmp_path / ".page.html.cifar-exp-tmp").symlink_to(tmp_path / "outside")
    write_atomically(tmp_path / "page.html", "mine")
    assert (tmp_path / "outside").read_text() == "precious"
    assert (tmp_path / "page.html").read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [
        {"artifacts": ["/etc/passwd"]},
        {"artifacts": ["../outside"]},
        {"artifacts": ["checkpoints/step-00000001.pt"]},
        {"artifacts": ["config.yaml", ".."]},
        {"artifacts": "config.yaml"},
        {"artifacts": [["a"]]},
        {"name": 3},
        {"params": []},
        {"tags": {"devices": 2}},
        {"started": 1e400},
        {"started": "now"},
        {"key": "' or 1 = 1"},
        {"origin": {"folder": "..", "step": "ten"}},
        {"origin": []},
        {"config_hash": [1]},
        {"config_hashes": 5},
        {"config_hashes": [[1]]},
        {"sessions": 5},
        {"sessions": [[1]]},
    ],
    ids=str,
)
def test_run_json_with_wrong_types_is_refused_by_field(run: Path, change: dict[str, Any]) -> None:
    (run / "run.json").write_text(json.dumps(FACTS | change))
    (name,) = change
    with pytest.raises(StorageError, match=rf"run\.json: the run cannot be read: {name}.*Restore that file"):
        RunInfo.load(run)


@pytest.mark.parametrize("content", ["[]", "5", "[1, 2]"])
def test_a_place_whose_facts_are_none_is_no_original(run: Path, content: str) -> None:
    other = run.parent / "other"
    other.mkdir()
    (other / "run.json").write_text(content)
    facts = FACTS | {"key": "k", "place": {"path": str(other), "device": 0, "inode": 0}}
    (run / "run.json").write_text(json.dumps(facts))
    assert claimed(run, "ab")[1] is None


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a":' * 100_000, "", "[]", "null", "1" * 5000, "\xff", "{}"],
    ids=lambda content: content[:8],
)
def test_invalid_run_json_is_refused(run: Path, content: str) -> None:
    (run / "run.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(StorageError, match=r"run\.json: the run cannot be read"):
        RunInfo.load(run)
    (run / "outcome.json").write_bytes(content.encode("latin-1"))
    assert Outcome.of(run) is None


def test_run_json_of_a_later_version_is_read(run: Path) -> None:
    (run / "run.json").write_text(json.dumps(FACTS | {"more": [1], "artifacts": ["config.yaml"]}))
    assert RunInfo.load(run).artifacts == ["config.yaml"]


@pytest.mark.parametrize("sweep", ["/home", "../../other", "0", "../..\0", "./../x"])
def test_sweep_path_outside_the_jobs_parents_is_ignored(run: Path, sweep: str) -> None:
    (run / "run.json").write_text(json.dumps(FACTS | {"sweep_dir": sweep}))
    assert RunInfo.load(run).sweep_dir is None
    (run / "run.json").write_text(json.dumps(FACTS | {"sweep_dir": "../.."}))
    assert RunInfo.load(run).sweep_dir == run / "../.."


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        "{",
        "[]",
        "{}",
        '{"step": "1", "epoch": 1, "time": 1, "metrics": {}}',
        '{"step": -1, "epoch": 1, "time": 1, "metrics": {}}',
        '{"step": 1e400, "epoch": 1, "time": 1, "metrics": {}}',
        '{"step": 1, "epoch": 1, "time": NaN, "metrics": {}}',
        '{"step": 1, "epoch": 1, "time": 1, "metrics": []}',
        '{"step": 1, "epoch": 1, "time": 1, "metrics": {"loss": null}}',
        '{"step": 1, "epoch": 1, "time": 1, "metrics": {"loss": 1' + "0" * 400 + "}}",
        "x" * (journal.LONGEST_LINE + 1),
        "\xff",
    ],
    ids=lambda line: line[:50],
)
def test_invalid_journal_line_is_reported_with_its_number(run: Path, line: str) -> None:
    (run / "metrics.jsonl").write_bytes((LINE + line).encode("latin-1") + b"\n")
    with pytest.raises(StorageError, match=r"metrics\.jsonl: the journal cannot be read after 1 lines: "):
        journal.read(run)


def test_endless_journal_line_takes_no_memory(run: Path) -> None:
    with (run / "metrics.jsonl").open("r+b") as file:
        file.truncate(journal.MOST_BYTES + 1)
    with pytest.raises(StorageError, match=r"268,435,457 bytes, and at most 268,435,456 are read"):
        journal.read(run)
    with pytest.raises(ValueError, match="longer than"):
        list(journal.JournalReader(run).new_entries())


@pytest.mark.parametrize("content", ["' or '1'='1", "a b", "x" * 65, "\x1b[2J", "../x", ""])
def test_invalid_run_id_counts_as_missing(run: Path, content: str) -> None:
    (run / "mlflow_run_id").write_text(content)
    assert journal.run_id(run) is None
    (run / "mlflow_run_id").write_text("0123456789abcdef\n")
    assert journal.run_id(run) == "0123456789abcdef"


def test_file_is_read_without_blocking_up_to_its_limit(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(foreign_files.RefusedFileError, match="not a regular file"):
        foreign_files.read_text(tmp_path / "fifo")
    with pytest.raises(foreign_files.RefusedFileError, match="not a regular file"):
        foreign_files.read_text(Path("/dev/zero"))
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    with pytest.raises(foreign_files.RefusedFileError, match="not a regular file"):
        foreign_files.read_text(tmp_path)  # a folder in place of the file
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(foreign_files.RefusedFileError, match="11 bytes, and at most 10 are read"):
        foreign_files.read_text(tmp_path / "large", 10)
    (tmp_path / "link").symlink_to("large")
    with pytest.raises(foreign_files.RefusedFileError, match="link to large"):
        foreign_files.read_text(tmp_path / "link")
    assert foreign_files.read_text(tmp_path / "large", 11) == "x" * 11


def bomb(levels: int) -> str:
    rows = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, levels)]
    return "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]", *rows, ""])


REFUSED_YAML = {
    "aliases that unfold": bomb(30),
    "merged aliases": "a: &a {x: 1, y: 2}\n" + "".join(f"b{n}: {{<<: *a}}\n" for n in range(9_000)),
    "an alias of itself": "a: &a [*a]",
    "an alias of nothing": "a: *b",
    "brackets": "a: " + "[" * 100_000,
    "mappings": "a: " + "{b: " * 50_000,
    "indents": "\n".join(" " * level + "a:" for level in range(200)),
    "size": "a: 1\n#" + "x" * limited_yaml.MOST_BYTES,
    "values": "a: [" + "1," * 100_000 + "1]",
    "one long value": "a: " + "x" * 30_000,
    "a number of base 60": "a: 1" + ":1" * 15_000,
    "interpolations": "a: '" + "${" * 9_000 + "'",
    "brackets in an interpolation": "a: '${a:" + "[" * 900 + "]" * 900 + "}'",
    "Python's objects": "a: !!python/object/apply:os.mkdir [executed]",
}


@pytest.mark.parametrize("kind", REFUSED_YAML)
def test_yaml_beyond_the_limits_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(REFUSED_YAML[kind])
    with pytest.raises((yaml.YAMLError, foreign_files.RefusedFileError)):
        stored_config(path)
    assert list(tmp_path.iterdir()) == [path]


def test_yaml_within_the_limits_is_read_with_its_aliases(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: &a {b: [1, 2]}\nc: *a\nd: {<<: *a, e: 1e-3}\nf: '${d.e}'\n")
    assert limited_yaml.load_file(path) == {
        "a": {"b": [1, 2]},
        "c": {"b": [1, 2]},
        "d": {"b": [1, 2], "e": 0.001},
        "f": 0.001,
    }
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(foreign_files.RefusedFileError):
        limited_yaml.load_file(tmp_path / "fifo")
