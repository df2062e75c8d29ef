"""Unusable names are refused before any file is written."""

import os
import sys
from pathlib import Path

import pytest

from cifar_exp.cli.api import train
from cifar_exp.cli.hydra_app import run_hydra
from cifar_exp.errors import ConfigError
from tests.conftest import TINY

BAD = os.fsdecode(b"bad \xff\xe9")  # Latin-1


def nothing(*_: object) -> None:
    pytest.fail("a job was started")


@pytest.fixture
def place(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "argv", ["cifar-exp"])
    return workplace


@pytest.mark.parametrize("setting", ["data.root", "hydra.run.dir"])
def test_path_that_is_not_utf_8_is_refused(place: Path, capsys: pytest.CaptureFixture[str], setting: str) -> None:
    assert run_hydra(nothing, [*TINY, f"{setting}={BAD}"]) == 2
    assert f"{setting}=bad \\xff\\xe9: the name is not valid UTF-8" in capsys.readouterr().err
    assert list(place.iterdir()) == []
    with pytest.raises(ConfigError, match=r"bad \\xff\\xe9: the name is not valid UTF-8.*Rename it"):
        train(TINY, BAD)


def test_current_folder_that_is_not_utf_8_or_was_removed_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / BAD
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert run_hydra(nothing, TINY) == 2
    folder.rmdir()
    assert run_hydra(nothing, TINY) == 2
    messages = capsys.readouterr().err.splitlines()
    assert messages[0].endswith("/bad \\xff\\xe9: the name is not valid UTF-8. Rename it")
    assert messages[1:] == ["cifar-exp: the current folder was removed. Change to one that exists"]
    assert list(place.iterdir()) == []
