"""With closed or broken standard streams, a command does its work and has the right exit code."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment

COMMAND = f"{sys.executable} -m cifar_exp"


def shell(line: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment(), check=False, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_the_exit_code_is_that_of_the_command(tmp_path: Path, closed: str) -> None:
    assert shell(f"{COMMAND} ui no-setting {closed}", tmp_path).returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_a_closed_stream_is_the_null_device_for_children_too(tmp_path: Path) -> None:
    """Without that, a file that is opened later gets the free descriptor, and what a child prints."""
    code = """
import subprocess, sys
from cifar_exp.system.standard_streams import open_closed_streams
open_closed_streams()
with open("mine", "w") as mine:
    print("lost")
    print("lost", file=sys.stderr)
    mine.write("kept")
    mine.flush()
    child = "import os, sys; print('x'); print('x', file=sys.stderr); os.write(1, b'x'); os.write(2, b'x')"
    sys.exit(subprocess.run([sys.executable, "-c", child]).returncode)
"""
    (tmp_path / "program.py").write_text(code)
    assert shell(f"{sys.executable} program.py <&- >&- 2>&-", tmp_path).returncode == 0
    assert (tmp_path / "mine").read_text() == "kept"


def test_closed_pipe_is_no_error(tmp_path: Path) -> None:
    done = shell(f"set -o pipefail; {COMMAND} --help | true; {COMMAND} train --help | head -1", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
