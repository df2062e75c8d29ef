"""Sweeps through `hydra/launcher=slurm` on a real Slurm: preemption, requeue, a killed parent, Ctrl-C."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cifar_exp.records import journal
from cifar_exp.records.run_folder import Outcome
from tests.conftest import Command
from tests.helpers.commands import ForkedCommand
from tests.helpers.mlflow_runs import all_runs, client
from tests.helpers.paced import PACED
from tests.helpers.processes import Start, wait_for
from tests.helpers.runs import REPEATABLE, curve, weights
from tests.helpers.slurm import PATIENCE, Cluster, missing, running_cluster

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.timeout(900)]
SLURM = ("-m", "hydra/launcher=slurm", "hydra.launcher.partition=low", "hydra.sweep.dir=sweep", "seed=0,1")
# 15 steps an epoch, each of which sleeps: 12 seconds of training.
SLOW = [*REPEATABLE, *(word for word in PACED if not word.startswith("train.epochs"))]
STARTING = 300.0  # seconds: each job imports PyTorch and MLflow


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(running: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, for commands of this test."""
    for name, value in running.variables.items():
        monkeypatch.setenv(name, value)
    return running


def outputs(workplace: Path) -> str:
    """What the jobs printed."""
    return "".join(path.read_text() for path in sorted((workplace / "sweep").glob("slurm-*/*.out")))


def until_both_train(workplace: Path, process: ForkedCommand) -> None:
    folders = [workplace / "sweep" / str(job) for job in range(2)]
    before = [len(journal.read(folder)) for folder in folders]
    wait_for(
        lambda: all(len(journal.read(folder)) > lines for folder, lines in zip(folders, before, strict=True)),
        process,
        STARTING,
    )


def test_preempted_jobs_are_requeued_and_end_with_the_weights_of_a_local_sweep(
    cluster: Cluster, cifar_exp: Command, started: Start, workplace: Path
) -> None:
    process = started(*SLURM, *SLOW)
    until_both_train(workplace, process)
    jobs = cluster.jobs("RUNNING")
    cluster.preempt()
    requeued: set[str] = set()
    while process.poll() is None:
        requeued |= set(cluster.start_requeued())
        time.sleep(0.5)
    output, errors = process.communicate()
    assert process.returncode == 0, errors + outputs(workplace)
    assert requeued == set(jobs)
    assert "submitted as Slurm job" in output
    assert outputs(workplace).count("is requeued") == 2
    assert outputs(workplace).count("SLURM_RESTART_COUNT=1: the job was requeued, and its run continues") == 2

    local = cifar_exp("-m", *REPEATABLE, "seed=0,1", "hydra.sweep.dir=local", "tracking=none")
    assert local.returncode == 0, local.stderr
    for job in ("0", "1"):
        ours, theirs = workplace / "sweep" / job, workplace / "local" / job
        assert curve(journal.read(ours)) == curve(journal.read(theirs))
        for name, value in weights(theirs).items():
            assert torch.equal(value, weights(ours)[name]), name
    runs = all_runs(client())
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in runs] == ["FINISHED"] * 3  # each job stayed in its MLflow run
    assert {run.data.tags.get("mlflow.parentRunId") for run in runs} == {None, parent.info.run_id}


def test_jobs_of_a_killed_sweep_finish_and_sync_closes_it(
    cluster: Cluster, cifar_exp: Command, started: Start, workplace: Path
) -> None:
    process = started(*SLURM, *SLOW, "train.epochs=4")
    until_both_train(workplace, process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + STARTING
    while cluster.jobs() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert [Outcome.of(workplace / "sweep" / job).status for job in ("0", "1")] == ["FINISHED"] * 2, outputs(workplace)
    synced = cifar_exp("sync", "sweep")
    assert synced.returncode == 0, synced.stderr
    runs = all_runs(client())
    assert len(runs) == 3
    assert "RUNNING" not in {run.info.status for run in runs}
    assert [run.info.status for run in runs if "mlflow.parentRunId" in run.data.tags] == ["FINISHED"] * 2


def test_ctrl_c_cancels_the_jobs_after_they_have_saved(cluster: Cluster, started: Start, workplace: Path) -> None:
    process = started(*SLURM, *SLOW, "train.epochs=1000")
    until_both_train(workplace, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(PATIENCE)
    assert process.returncode == 130, errors
    assert "are cancelled; running ones save, and the same command with resume=" in errors
    deadline = time.monotonic() + PATIENCE
    while cluster.jobs() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert outputs(workplace).count("saved after step") == 2
    assert "requeued" not in outputs(workplace)
    assert [Outcome.of(workplace / "sweep" / job).status for job in ("0", "1")] == ["KILLED"] * 2
