"""``from cifar_exp import train``: what scripts and notebooks call."""

import subprocess
import sys
from pathlib import Path

import pytest

from cifar_exp import train
from cifar_exp.errors import ConfigError
from cifar_exp.records import journal
from tests.conftest import TINY, environment

SCRIPT = """
from cifar_exp import train

result = train({overrides!r}, folder="mine")
print("result:", result.test_accuracy, result.folder)
"""


def test_script_without_main_guard_trains_once_on_two_ranks(workplace: Path) -> None:
    overrides = [*TINY, "devices.count=2", "devices.oversubscribe=true", "tracking=none", "progress=quiet"]
    (workplace / "script.py").write_text(SCRIPT.format(overrides=overrides))
    words = [sys.executable, "script.py"]
    done = subprocess.run(words, cwd=workplace, env=environment(), capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stderr) == (0, "")
    last = journal.last_values(workplace / "mine")
    assert last["test/count"] == 33
    assert done.stdout == f"result: {last['test/accuracy']} mine\n"
    assert not (workplace / "outputs").exists()


def test_invalid_setting_raises_and_leaves_no_files(workplace: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs=0: it must be 1 or more"):
        train(["train.epochs=0"], folder="mine")
    assert list(workplace.iterdir()) == []
