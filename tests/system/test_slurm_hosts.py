"""launcher=slurm: hosts, rank and rendezvous from the variables of a job step."""

import pytest

from cifar_exp.errors import ConfigError
from cifar_exp.system.slurm_hosts import SlurmHosts, first_node
from tests.helpers.slurm_step import STEP


def test_a_task_knows_its_host() -> None:
    assert SlurmHosts.here(STEP) == SlurmHosts(3, 1, "gpu03:24567")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[7,9-12]", "n7"), ("a[01-02]-ib,b3", "a01-ib"), ("rack1-n[3-4],x", "rack1-n3")],
)
def test_the_first_node_of_slurms_lists(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_several_tasks_on_a_host_are_refused_with_what_to_type() -> None:
    with pytest.raises(ConfigError, match=r"12 tasks on 3 hosts.*--ntasks-per-node=1"):
        SlurmHosts.here(STEP | {"SLURM_STEP_NUM_TASKS": "12"})


@pytest.mark.parametrize("missing", STEP)
def test_outside_a_step_it_is_refused(missing: str) -> None:
    with pytest.raises(ConfigError, match="not a task of srun"):
        SlurmHosts.here({name: value for name, value in STEP.items() if name != missing})
