"""Temporary folders are private and removed at the end, or after a kill by the next start; never while in use."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_exp.system.atomic_files import atomic_folder, remove_unfinished
from cifar_exp.system.marked_folders import is_marked, mark
from cifar_exp.system.temp_folder import private_folder
from tests.conftest import environment

HOLD = """
import time
from cifar_exp.system.atomic_files import atomic_folder, remove_unfinished
from cifar_exp.system.marked_folders import is_marked, mark
from cifar_exp.system.temp_folder import private_folder
with private_folder() as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


def test_folder_of_a_killed_process_is_removed_and_a_locked_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    env = environment() | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", HOLD], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        other = Path(process.stdout.readline().strip())
        with private_folder() as mine:
            assert {path.name for path in tmp_path.iterdir()} == {mine.name, other.name}
            assert mine.stat().st_mode & 0o777 == 0o700
        assert list(tmp_path.iterdir()) == [other]
        process.kill()
    assert list(tmp_path.iterdir()) == [other]
    with private_folder() as mine:
        assert list(tmp_path.iterdir()) == [mine]
    assert list(tmp_path.iterdir()) == []


def test_folders_of_other_programs_with_such_a_name_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run, a data root, a copy of a temporary folder and a link, whatever files they hold."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run, data = tmp_path / "cifar-exp-run", tmp_path / "cifar-exp-data"
    for folder in (run, data):
        folder.mkdir()
        (folder / ".lock").touch()
        (folder / "kept").touch()
    with private_folder() as mine:
        shutil.copytree(mine, tmp_path / "cifar-exp-copy")
        shutil.copytree(mine, tmp_path / "elsewhere")
    elsewhere = tmp_path / "elsewhere"
    mark(elsewhere)
    (tmp_path / "cifar-exp-link").symlink_to(elsewhere)
    before = sorted(tmp_path.rglob("*"))
    with private_folder():
        pass
    assert sorted(tmp_path.rglob("*")) == before
    elsewhere.rename(tmp_path / "cifar-exp-elsewhere")  # the mark of a process that is gone
    with private_folder():
        pass
    assert not (tmp_path / "cifar-exp-elsewhere").exists()


def test_image_cache_keeps_folders_of_other_programs(tmp_path: Path) -> None:
    (tmp_path / "unfinished-work").mkdir()
    (tmp_path / "unfinished-dead").mkdir()
    mark(tmp_path / "unfinished-dead")
    remove_unfinished(tmp_path)
    with atomic_folder(tmp_path / "data") as folder:
        (folder / "a").write_text("b")
        assert is_marked(folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "data", "unfinished-work"]


def test_a_signal_while_it_is_removed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    remove, calls = os.rmdir, []

    def interrupted(path: str, **how: int | None) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(path, **how)

    def use() -> None:
        with private_folder() as folder:
            (folder / "beat").touch()
            monkeypatch.setattr("os.rmdir", interrupted)

    with pytest.raises(KeyboardInterrupt):
        use()
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []
