"""The hosts of a Slurm job step, from the variables that srun sets for each task: launcher=slurm."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cifar_exp.errors import ConfigError

FIRST_PORT, PORTS = 20000, 10000  # the port of host 0 follows from the job's number, so that jobs on one host differ
_FIRST_NODE = re.compile(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?")
REMEDY = "Run srun --ntasks-per-node=1 cifar-exp launcher=slurm <settings> in an allocation, or set launcher=elastic"


@dataclass(frozen=True)
class SlurmHosts:
    """The hosts of the step in which this process is a task.

    Attributes:
        hosts: number of hosts.
        host_rank: the number of this one.
        rendezvous: ``host:port`` of the first one.
    """

    hosts: int
    host_rank: int
    rendezvous: str

    @classmethod
    def here(cls, environment: Mapping[str, str] | None = None) -> "SlurmHosts":
        """Read the variables of ``environment``; None: those of this process.

        Raises:
            ConfigError: this process is not the only task of a job step on its host.
        """
        variables = os.environ if environment is None else environment
        names = ("SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID", "SLURM_JOB_ID")
        values = [variables.get(name, "") for name in names]
        nodes = variables.get("SLURM_STEP_NODELIST", "")
        if not nodes or not all(value.isdecimal() for value in values):
            raise ConfigError(f"launcher=slurm: this process is not a task of srun. {REMEDY}")
        hosts, tasks, host_rank, job = map(int, values)
        if tasks != hosts:
            raise ConfigError(
                f"launcher=slurm: srun has started {tasks} tasks on {hosts} hosts; each host starts its ranks itself "
                f"and needs one. {REMEDY}"
            )
        return cls(hosts, host_rank, f"{first_node(nodes)}:{FIRST_PORT + job % PORTS}")


def first_node(nodes: str) -> str:
    """The first name of Slurm's list of nodes: ``gpu[03-05,9],login`` starts with ``gpu03``."""
    found = _FIRST_NODE.match(nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes
