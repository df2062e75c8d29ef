"""The kernels stay behind one entry: the package trains without them, and their cache notices every edit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO, TINY, environment

PACKAGE = REPO / "cifar_exp"
FOLDER = PACKAGE / "cpu_kernels"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with a copy of the package."""
    shutil.copytree(PACKAGE, tmp_path / "copy" / "cifar_exp", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPO / "conf", tmp_path / "copy" / "conf")
    return tmp_path / "copy"


def run(copy: Path, *command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run Python in ``copy``, with the package imported from there."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=copy,
        env=environment() | {"PYTHONPATH": str(copy)} | variables,
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_package_trains_without_the_cpu_kernels_folder(copied: Path) -> None:
    shutil.rmtree(copied / "cifar_exp" / "cpu_kernels")
    done = run(copied, "-m", "cifar_exp", *TINY, "tracking=none", "hydra.run.dir=run", "progress=quiet")
    assert done.returncode == 0, done.stderr
    assert "layers are not fused (No module named 'cifar_exp.cpu_kernels'): using PyTorch's own" in done.stdout
    assert (copied / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("edited", sorted(path.name for path in FOLDER.glob("*.py")))
def test_an_edit_of_any_file_changes_the_cache_key(edited: str) -> None:
    """The key is a hash of the content of every file, so every edit changes it."""
    from cifar_exp.cpu_kernels import numba_runtime

    assert (FOLDER / edited).read_bytes() in numba_runtime.SOURCES


TRAIN_STEP = """
import torch
from torch import nn
from cifar_exp.cpu_kernels.fuse import fuse
layers = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).to(memory_format=torch.channels_last)
assert fuse(layers, torch.float32) is None
images = torch.linspace(-1, 1, 2 * 4 * 8 * 8).view(2, 4, 8, 8).to(memory_format=torch.channels_last)
print(layers(images).sum().item())
"""


def test_an_edited_helper_is_compiled_again(copied: Path, tmp_path: Path) -> None:
    """The kernel's own file is the same; the helper that it calls from another file computes something else."""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    before, again = (run(copied, "-c", TRAIN_STEP, **cache) for _ in range(2))
    assert before.returncode == 0, before.stderr
    assert float(again.stdout) == float(before.stdout) > 1
    kept = compiled_files(tmp_path / "cache")
    helper = copied / "cifar_exp" / "cpu_kernels" / "activations.py"
    text = helper.read_text()
    assert text.count("return ZERO if value < ZERO else value") == 1
    stamp = helper.stat()
    helper.write_text(text.replace("return ZERO if value < ZERO else value", "return ZERO"))
    os.utime(helper, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # the key does not rest on times
    shutil.rmtree(helper.parent / "__pycache__", ignore_errors=True)
    after = run(copied, "-c", TRAIN_STEP, **cache)
    assert after.returncode == 0, after.stderr
    assert float(after.stdout) == 0
    assert kept < compiled_files(tmp_path / "cache")


def compiled_files(cache: Path) -> set[str]:
    """The names of all machine code in a cache."""
    return {path.name for path in cache.rglob("*.nbc")}
