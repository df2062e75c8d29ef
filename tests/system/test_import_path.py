"""Files of the current folder never replace modules of Python or of libraries; users' own modules are still found."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cifar_exp.cli import ui
from cifar_exp.system import import_path
from cifar_exp.system.import_path import SafeHelpers, use_safe_path
from tests.conftest import TINY, the_run

NAMES = ("socket", "struct", "pickle", "selectors", "yaml", "random", "torch", "numpy", "logging", "signal", "typing")
IMPORTS = "import socket, struct, pickle, selectors, yaml, random, logging, signal, typing"


@pytest.fixture
def shadowed(workplace: Path) -> Path:
    """A current folder with files that are called like modules."""
    for name in NAMES:
        (workplace / f"{name}.py").write_text("raise RuntimeError('a file of the current folder was run')")
    return workplace


@pytest.mark.parametrize("path", ["", ":/nowhere", "/nowhere:", "."])
def test_helper_processes_do_not_run_files_of_the_current_folder(
    shadowed: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{path}{os.pathsep}{shadowed.parent}")
    before = dict(os.environ)
    with SafeHelpers():
        subprocess.run([sys.executable, "-c", IMPORTS], check=True)
        assert os.environ["PYTHONPATH"].split(os.pathsep)[-1] == str(shadowed.parent)
    assert dict(os.environ) == before
    served = ui.environment("sqlite:///runs.db")
    assert served["PYTHONSAFEPATH"] == "1"
    assert str(shadowed) not in served["PYTHONPATH"]
    arguments = ui.server_arguments(5000)
    assert arguments[arguments.index("--uvicorn-opts") + 1] == "--app-dir /dev/null"


def test_a_command_searches_the_current_folder_last(shadowed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = list(sys.path)
    monkeypatch.setattr("sys.path", ["", str(shadowed), *path, "."])
    monkeypatch.setattr("os.environ", dict(os.environ))
    use_safe_path()
    assert sys.path == [*path, str(shadowed)]
    assert os.environ["PYTHONSAFEPATH"] == "1"


def test_a_run_in_such_a_folder_finds_the_users_own_module(
    shadowed: Path, born: Callable[..., "subprocess.Popen[str]"]
) -> None:
    head = "from torch import nn\n\ndef net(num_classes, width, depth):\n"
    network = f"{head}    return nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes))\n"
    (shadowed / "my_module.py").write_text(network)
    own = ["model._target_=my_module.net", "trusted_modules=[my_module]", "tracking=none", "progress=quiet"]
    process = born(*TINY, *own, "train.epochs=1", "devices.count=2", "devices.oversubscribe=true")
    _, errors = process.communicate(timeout=200)
    assert (process.returncode, errors) == (0, "")
    assert (the_run(shadowed) / "model.safetensors").exists()


@pytest.mark.parametrize(("installed", "place"), [(True, 3), (False, 1)])
def test_uninstalled_copy_precedes_the_installed_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: bool, place: int
) -> None:
    """Python 3.14's fork server has the search path of its parent, and would take the installed one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(import_path, "_IS_INSTALLED", installed)
    monkeypatch.setattr(import_path.SafeHelpers, "__enter__", lambda _: None)
    others = ["/python/lib", "/python/site-packages", "/installed"]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *others])
    use_safe_path()
    assert sys.path == [*others[:place], str(tmp_path), *others[place:]]
