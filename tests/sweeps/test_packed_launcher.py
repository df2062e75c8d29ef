"""Jobs side by side with `hydra/launcher=packed`: results of a serial sweep, signals, deaths, and Hydra's own suite."""

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from hydra.core.plugins import Plugins
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, LauncherTestSuite

from cifar_exp.errors import ConfigError
from cifar_exp.records import journal
from cifar_exp.records.run_folder import RUN_FILE
from cifar_exp.sweeps.packed_launcher import PackedLauncher
from tests.conftest import TINY, Command
from tests.helpers.commands import ForkedCommand
from tests.helpers.marks import pinning
from tests.helpers.mlflow_runs import all_runs, client
from tests.helpers.processes import Start, assert_nothing_is_left, wait_for
from tests.helpers.runs import REPEATABLE, curve

pytest.importorskip("joblib", reason="needs the package joblib (the extra cifar-exp[packed])")
PACKED = "hydra/launcher=packed"
LONG = [*TINY, "train.epochs=4000", "tracking=none"]


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> None:
    """Hydra's suite restores the state of Hydra as it was before each test: with the plugins, which are loaded once."""
    Plugins.instance()


@pytest.mark.parametrize(("launcher_name", "overrides"), [("packed", ["hydra/sweeper=study", "hydra.job.chdir=true"])])
class TestHydrasSuite(LauncherTestSuite):
    """All jobs in one batch."""


@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [("packed", ["hydra/sweeper=study", "hydra.job.chdir=true", "hydra.sweeper.max_batch_size=2"])],
)
class TestHydrasSuiteInBatches(BatchedSweeperTestSuite):
    """Two jobs a batch."""


def job_folders(workplace: Path) -> dict[str, Path]:
    return {path.parent.name: path.parent for path in (workplace / "outputs" / "multirun").rglob(RUN_FILE)}


@pinning
def test_the_results_are_those_of_a_serial_sweep_and_a_bad_job_does_not_end_it(
    cifar_exp: Command, workplace: Path
) -> None:
    words = ["-m", *REPEATABLE, "train.epochs=2", "model.depth=1,0", "seed=0,1"]
    packed = cifar_exp(*words, PACKED)
    assert packed.returncode == 2, packed.stderr
    assert packed.stderr.count("model.depth=0: it must be 1 or more") == 2
    assert "2 jobs at a time, each on its own devices: core" in packed.stdout
    assert "they shared it, so images/s are lower" in packed.stdout
    found = job_folders(workplace)
    assert sorted(found) == ["0", "1"]  # refused jobs leave no folder
    store = client()
    (parent,) = [run for run in all_runs(store) if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in all_runs(store) if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert parent.info.status == "FAILED"
    assert [run.info.status for run in children] == ["FINISHED", "FINISHED"]

    serial = cifar_exp(*words, "tracking=none", "hydra.sweep.dir=outputs/multirun/serial")
    assert serial.returncode == 2, serial.stderr
    for number, folder in found.items():
        again = workplace / "outputs" / "multirun" / "serial" / number
        assert curve(journal.read(folder)) == curve(journal.read(again))


def test_a_sweep_over_device_counts_is_refused_and_leaves_nothing(cifar_exp: Command, workplace: Path) -> None:
    for wrong, code, message in (
        ("devices.count=1,2", 2, "jobs need different devices (devices.count=1,2)"),
        ("devices.count=999", 4, "requested 999 cores"),
        ("hydra.launcher.n_jobs=0", 2, "hydra.launcher.n_jobs=0: it must be 1 or more"),
    ):
        done = cifar_exp("-m", *TINY, "seed=0,1", wrong, PACKED)
        assert done.returncode == code
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert not (workplace / "outputs" / "multirun").exists()
    assert all_runs(client()) == []


def test_without_joblib_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "joblib", None)
    nothing: Any = None
    with pytest.raises(ConfigError, match=r"pip install 'cifar-exp\[packed\]'"):
        PackedLauncher().setup(hydra_context=nothing, task_function=nothing, config=nothing)


def trained_steps(workplace: Path) -> dict[str, int]:
    entries = {name: journal.read(folder) for name, folder in job_folders(workplace).items()}
    return {name: found[-1].step for name, found in entries.items() if found}


@pinning
def test_a_signal_saves_all_jobs_of_which_each_has_its_own_core_and_starts_no_other(
    started: Start, workplace: Path
) -> None:
    sweep = started("-m", *LONG, "seed=0,1,2", PACKED)
    wait_for(lambda: len(trained_steps(workplace)) == 2, sweep)
    family = psutil.Process(sweep.pid).children(recursive=True)
    used = [set(child.cpu_affinity()) for child in _slots(sweep)]
    assert len(used) == 2
    assert not used[0] & used[1]
    sweep.send_signal(signal.SIGTERM)
    output, errors = sweep.communicate(60)
    assert sweep.returncode == 143, output + errors
    assert "Traceback" not in errors
    assert "resource_tracker" not in errors
    assert_nothing_is_left(family)
    assert sorted(job_folders(workplace)) == ["0", "1"]
    for folder in job_folders(workplace).values():
        assert json.loads((folder / "outcome.json").read_text())["status"] == "KILLED"
        assert list((folder / "checkpoints").iterdir())


@pinning
@pytest.mark.long
def test_a_killed_process_ends_its_job_alone_and_a_killed_command_leaves_nothing(
    started: Start, workplace: Path
) -> None:
    sweep = started("-m", *LONG, "seed=0,1,2", PACKED)
    wait_for(lambda: len(trained_steps(workplace)) == 2, sweep)
    _slots(sweep)[0].kill()
    wait_for(lambda: "2" in trained_steps(workplace), sweep)  # the next job, in a new process
    family = psutil.Process(sweep.pid).children(recursive=True)
    sweep.kill()
    assert "its process ended by SIGKILL(-9), perhaps for lack of memory" in sweep.communicate(30)[1]
    psutil.wait_procs(family, timeout=5)  # a slot looks for its parent four times a second
    assert_nothing_is_left(family)


def _is_slot(process: psutil.Process) -> bool:
    return "loky" in " ".join(process.cmdline()) and "resource_tracker" not in " ".join(process.cmdline())


def _slots(command: ForkedCommand) -> list[psutil.Process]:
    return [child for child in psutil.Process(command.pid).children() if _is_slot(child)]
