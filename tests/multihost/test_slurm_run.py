"""`launcher=slurm`: one run over the nodes of a job step, on a real Slurm."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TINY
from tests.conftest import Command as RunCommand
from tests.helpers.commands import environment
from tests.helpers.hosts import HERE
from tests.helpers.slurm import Cluster, missing, running_cluster

pytestmark = [pytest.mark.long, pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.timeout(600)]
SHORT = [*(word for word in TINY if not word.startswith("devices.count")), *HERE]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


def srun(cluster: Cluster, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a step of two nodes. Both are this machine, so the rendezvous is typed."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "cifar_exp", *SHORT, "launcher=slurm", f"launcher.rendezvous={address}"]
    variables = environment() | cluster.variables | {"CIFAR_EXP_TOKEN": "a secret of this test"}
    options = ["--partition=high", "--nodes=2", f"--chdir={folder}", *words]
    return subprocess.run(
        ["srun", *options, *command],
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_one_run_over_two_nodes_is_that_of_two_local_ranks(
    cluster: Cluster, cifar_exp: RunCommand, workplace: Path
) -> None:
    done = srun(cluster, workplace, "--ntasks-per-node=1")
    assert done.returncode == 0, done.stderr
    ours = load_file(workplace / "run" / "model.safetensors")
    one = cifar_exp(*SHORT, "hydra.run.dir=one")
    assert one.returncode == 0, one.stderr
    theirs = load_file(workplace / "one" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


def test_several_tasks_on_a_node_are_refused(cluster: Cluster, workplace: Path) -> None:
    done = srun(cluster, workplace, "--ntasks=4")
    assert done.returncode == 2
    assert "srun has started 4 tasks on 2 hosts" in done.stderr
    assert not (workplace / "run").exists()
