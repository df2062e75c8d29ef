"""Launchers and schedulers, by environment variables: several processes are refused, requeued jobs resume."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cifar_exp.cli.api import train
from cifar_exp.cli.train import command
from cifar_exp.errors import ConfigError
from cifar_exp.records.run_folder import RUN_FILE
from cifar_exp.runs import prepare
from cifar_exp.runs.context import RunContext
from cifar_exp.sweeps.sweep_resume import SWEEP_FILE, claimed_sweep
from cifar_exp.system import scheduler
from cifar_exp.system.scheduler import refuse_many_processes, requeued
from tests.conftest import environment

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}
MANY = {
    "torchrun": TORCHRUN,
    "torchrun in a notebook": TORCHRUN | {"JPY_PARENT_PID": "1"},
    "a cluster that starts each process by itself": {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host-0"},
    "srun": STEP | {"SLURM_STEP_NUM_TASKS": "2"},
    "srun of an old version": STEP,
    "a later process of srun": {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
    "mpirun": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
    "mpiexec": {"PMI_SIZE": "2", "PMI_RANK": "1"},
    "srun of MPI": STEP | {"PMI_SIZE": "2", "PMI_RANK": "1"},
    "submitit": {"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1"},
}
ONE = {
    "a shell": {},
    "torchrun with one process": TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"},
    "a number of a rank that somebody left": {"RANK": "1", "LOCAL_RANK": "1"},
    "a number of ranks that somebody left": {"WORLD_SIZE": "8"},
    "no number": TORCHRUN | {"WORLD_SIZE": "many"},
    "a cell of a notebook": {"RANK": "0", "WORLD_SIZE": "2", "JPY_PARENT_PID": "1"},
    "salloc": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
    "salloc with a step for its shell": STEP | {"SLURM_STEP_ID": "4294967290"},
    "a batch script for four tasks": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
    "one task of such a script": STEP | {"SLURM_STEP_NUM_TASKS": "1"},
    "srun --pty": STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PTY_PORT": "40000"},
    "mpirun with one process": {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
}


@pytest.mark.parametrize("variables", MANY.values(), ids=MANY)
def test_process_of_another_launcher_is_refused_with_a_remedy(variables: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"has started 2 processes.*once.* devices\.count=2\. ") as refused:
        refuse_many_processes(variables)
    typed = str(refused.value).rpartition("run env ")[2].split()
    unset = {name for option, name in pairwise(typed) if option == "-u"}
    refuse_many_processes({name: value for name, value in variables.items() if name not in unset})


@pytest.mark.parametrize("variables", ONE.values(), ids=ONE)
def test_single_process_is_not_refused(variables: dict[str, str]) -> None:
    refuse_many_processes(variables)


def test_own_environment_variables_are_not_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that the process itself set, as a notebook may, do not count."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    refuse_many_processes()


def test_command_under_another_launcher_is_refused_and_leaves_no_files(workplace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cifar_exp", "tracking=none"],
        env=environment() | TORCHRUN,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert "cifar-exp: WORLD_SIZE=2: torchrun has started 2 processes" in done.stderr
    assert "| hydra\n" not in done.stderr, "something heavy was imported before"
    assert "| torch\n" not in done.stderr, "something heavy was imported before"
    assert not list(workplace.iterdir())


def test_train_function_is_refused_under_a_launcher_and_help_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_inherited", lambda: TORCHRUN)
    with pytest.raises(ConfigError, match="torchrun"):
        train(["tracking=none"])
    assert command.callback is not None
    with pytest.raises(ConfigError, match="torchrun"):
        command.callback(("tracking=none",))
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr("cifar_exp.cli.hydra_app.run_hydra", lambda _job, words, _check: asked.append(words))
    command.callback(("--cfg", "job"))
    assert asked == [("--cfg", "job")]


def test_a_requeued_job_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_RESTART_COUNT", "SUBMITIT_LOCAL_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert requeued({}) == requeued() == ""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert requeued() == ""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert requeued() == "SLURM_RESTART_COUNT=2"
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "71")
    tags = scheduler.job_tags()
    assert requeued(tags) == "SUBMITIT_LOCAL_JOB_ID=71"
    assert requeued({}) == requeued() == ""
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "72")
    assert requeued(tags) == ""


def test_a_requeued_sweep_continues_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, arguments = tmp_path / "sweep", ["seed=0,1"]
    with claimed_sweep(folder, "never", arguments):
        pass
    with pytest.raises(ConfigError, match="has a sweep already"), claimed_sweep(folder, "never", arguments):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with claimed_sweep(folder, "never", arguments) as claimed:
        assert claimed.samefile(folder)
    with pytest.raises(ConfigError, match="overrides were"), claimed_sweep(folder, "never", ["seed=0,1,2"]):
        pass
    typed = [*arguments, "resume=never"]
    with pytest.raises(ConfigError, match="has a sweep already"), claimed_sweep(folder, "never", typed):
        pass
    assert (folder / SWEEP_FILE).exists()


def test_requeued_job_without_a_fixed_folder_is_warned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    config: Any = SimpleNamespace(resume="never")
    assert prepare._wanted(config, RunContext(tmp_path)) is config
    assert "SLURM_RESTART_COUNT=1: the job was requeued, and trains from the beginning" in capsys.readouterr().err
    (tmp_path / RUN_FILE).touch()
    assert prepare._wanted(config, RunContext(tmp_path, ("resume=never",))) is config
    assert prepare._wanted(SimpleNamespace(resume="auto"), RunContext(tmp_path)).resume == "auto"  # type: ignore[arg-type]
    assert not capsys.readouterr().err
