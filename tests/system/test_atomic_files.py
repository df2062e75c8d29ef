"""Atomic writes: readers see the old content or the new content, and no other file is left."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_exp.display.figure_style import empty_figure, save_png
from cifar_exp.system.atomic_files import complete, write_csv
from tests.conftest import environment


def test_csv_is_quoted_as_csv_is(tmp_path: Path) -> None:
    rows = [{"name": 'a "b", c', "value": 1}, {"name": "é\nf", "value": None}]
    write_csv(tmp_path / "table.csv", rows)
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{"name": 'a "b", c', "value": "1"}, {"name": "é\nf", "value": ""}]


def test_a_figure_that_cannot_be_drawn_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, figure = tmp_path / "figure.png", empty_figure(2)
    save_png(figure, path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def stop(path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", stop)
    with pytest.raises(KeyboardInterrupt):
        save_png(figure, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"figure.png": before}


def test_a_partial_file_gets_its_name_once_its_content_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, path, synced = tmp_path / "file.part", tmp_path / "file", list[bool]()
    part.write_text("content")
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.exists()))
    complete(part, path)
    assert path.read_text() == "content"
    assert synced == [False, True]  # the content before, the name after


def test_socket_folder_is_created_once_and_removed_at_the_end(tmp_path: Path) -> None:
    code = (
        "import multiprocessing, os, sys; from cifar_exp.system.surroundings import make_socket_folder as make;"
        "make(sys.argv[1]); folder = multiprocessing.current_process()._config['tempdir']; make();"
        "assert multiprocessing.current_process()._config['tempdir'] == folder;"
        "assert os.listdir(sys.argv[1]) == [os.path.basename(folder)]"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment(), check=True)
    assert list(tmp_path.iterdir()) == []
