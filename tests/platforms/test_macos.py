"""A run where what macOS lacks is taken away (``macos/``): from command to report and resume, in real processes.

Linux stays underneath: Metal, Apple's libraries and its scheduler are not tried.
"""

import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cifar_exp.records import journal
from tests.conftest import TINY
from tests.helpers.marks import linux
from tests.helpers.mlflow_runs import all_runs, client
from tests.helpers.processes import assert_nothing_is_left, wait_for
from tests.helpers.readme import folders

Start = Callable[..., "subprocess.Popen[str]"]
pytestmark = linux
SPAWNED = "multiprocessing.spawn"


@pytest.fixture
def on_macos(monkeypatch: pytest.MonkeyPatch, born: Start) -> Start:
    """``born`` without what macOS lacks."""

    def start(*arguments: str) -> "subprocess.Popen[str]":
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", str(Path(__file__).parent / "macos"))
            return born(*arguments)

    return start


@pytest.mark.timeout(900)
def test_ranks_are_spawned_tracked_and_reported_with_the_accuracy_of_linux(
    on_macos: Start, started: Start, workplace: Path
) -> None:
    # In float32 on both: without /proc the emulated machine does not know that its processor multiplies bfloat16.
    arguments = ["-m", *TINY, "devices.count=1,2", "progress=lines", "train.precision=fp32"]
    process = on_macos(*arguments, "hydra.sweep.dir=mac")
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert errors == ""
    assert output.count("train.compile=auto: layers are not fused (OSError") == 2
    assert "libtorch_cpu.dylib" in output
    assert "machine: Apple M0" in output
    assert (workplace / "mac" / "speedup.html").exists()
    runs = [run for run in all_runs(client()) if run.data.tags.get("devices") in ("1", "2")]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.tags["machine.processor"] for run in runs} == {"Apple M0"}
    process = started(*arguments, "hydra.sweep.dir=linux", "train.compile=never", "tracking=none")
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    for job in ("0", "1"):
        mac, linux = (journal.last_values(workplace / name / job) for name in ("mac", "linux"))
        assert mac["test/accuracy"] == linux["test/accuracy"]
        assert mac["test/loss"] == pytest.approx(linux["test/loss"], rel=1e-5)


@pytest.mark.timeout(600)
def test_processes_that_read_image_files_are_spawned_too(on_macos: Start, started: Start, workplace: Path) -> None:
    folders(workplace / "images")
    settings = [*TINY, "data=folders", "data.root=images", "data.residency=loader", "data.image_size=32"]
    settings = [setting for setting in settings if not setting.startswith(("data=synthetic", "data.t"))]
    settings += ["train.batch_size=16", "devices.count=2", "tracking=none", "train.precision=fp32", "progress=quiet"]
    for start, name in ((on_macos, "mac"), (started, "linux")):
        _, errors = start(*settings, f"hydra.run.dir={name}").communicate(timeout=280)
        assert errors == ""
    mac, linux = (journal.last_values(workplace / name) for name in ("mac", "linux"))
    assert mac["test/accuracy"] == linux["test/accuracy"]
    assert mac["test/loss"] == pytest.approx(linux["test/loss"], rel=1e-5)


@pytest.mark.timeout(900)
def test_stopped_run_leaves_no_processes_and_resumes(on_macos: Start, workplace: Path) -> None:
    """Ctrl-C reaches all processes of the terminal."""
    long = [*TINY, "train.epochs=100000", "devices.count=2", "tracking=none", "hydra.run.dir=run", "resume=auto"]
    process = on_macos(*long)
    wait_for(lambda: any(path.stat().st_size for path in workplace.rglob("metrics.jsonl")), process)
    family = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in family if SPAWNED in " ".join(child.cmdline())]
    assert len(ranks) == 2
    assert not any("forkserver" in " ".join(child.cmdline()) for child in family)
    for member in (psutil.Process(process.pid), *ranks):
        member.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "saved after step" in output
    assert_nothing_is_left(family)
    saved = max(int(step) for step in re.findall(r"saved after step (\d+)", output))
    process = on_macos(*long)
    again = process
    wait_for(lambda: max((entry.step for entry in journal.read(workplace / "run")), default=0) > saved + 3, again)
    family = psutil.Process(again.pid).children(recursive=True)
    again.kill()  # whatever becomes of their parent, ranks end
    again.wait()
    assert_nothing_is_left(family)
