"""Detect from environment variables which launcher or scheduler started this process."""

import os
from collections.abc import Mapping

from cifar_exp.errors import ConfigError
from cifar_exp.system import host

# The launcher, its variable with the number of processes, and its variable with the number of this one.
LAUNCHERS = (
    ("torchrun", "WORLD_SIZE", "RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("srun", "SLURM_NTASKS", "SLURM_PROCID"),
    ("submitit", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_GLOBALID"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpirun", "PMI_SIZE", "PMI_RANK"),
    ("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)
INTERACTIVE_STEP = "4294967290"  # Slurm's number for the step of an interactive allocation
RESTARTS = "SLURM_RESTART_COUNT"  # how often Slurm has requeued this job; missing before the first time
LOCAL_JOB = "SUBMITIT_LOCAL_JOB_ID"  # submitit restarts a job with the same number and sets no restart count
JOB_TAG = "submitit_job"


def refuse_many_processes(environment: Mapping[str, str] | None = None, are_hosts: bool = False) -> None:
    """Refuse to start as one of several processes of a launcher: each would train the whole run.

    Args:
        environment: None: that of this process.
        are_hosts: whether the command line says that there are several hosts. Then one process on each is right.

    Raises:
        ConfigError: a launcher has started several processes.
    """
    variables = _inherited() if environment is None else environment
    found = [names for names in LAUNCHERS if _started_several(*names, variables)]
    if not found or (are_hosts and not _are_several_here(variables)):
        return
    launcher, size, _ = found[0]
    count, unset = variables[size], " ".join(dict.fromkeys(f"-u {rank}" for _, _, rank in found))
    once = "srun --ntasks=1 --cpus-per-task=<cores> cifar-exp" if launcher == "srun" else "cifar-exp"
    raise ConfigError(
        f"{size}={count}: {launcher} has started {count} processes, and each would train the whole run. Start the "
        f"command once, on one host; it starts its ranks itself. Run {once} <settings> devices.count={count}. If "
        f"{launcher} is not running, or each process should train its own run, run env {unset} cifar-exp <settings>"
    )


def job_tags() -> dict[str, str]:
    """The job-id tag; it identifies the run after a restart. Empty if the scheduler counts restarts."""
    return {JOB_TAG: os.environ[LOCAL_JOB]} if LOCAL_JOB in os.environ else {}


def requeued(tags: Mapping[str, str] | None = None) -> str:
    """``NAME=value`` if a scheduler has requeued this job; else empty.

    Args:
        tags: the tags of the run that is already in the job's folder.
    """
    count, job = os.environ.get(RESTARTS, ""), os.environ.get(LOCAL_JOB)
    if count.isdecimal() and int(count):
        return f"{RESTARTS}={count}"
    return f"{LOCAL_JOB}={job}" if job and tags and tags.get(JOB_TAG) == job else ""


def _are_several_here(variables: Mapping[str, str]) -> bool:
    """Whether a launcher has started several processes on this host."""

    def number(name: str) -> int:
        value = variables.get(name, "")
        return int(value) if value.isdecimal() else 1

    local = max(number("LOCAL_WORLD_SIZE"), number("OMPI_COMM_WORLD_LOCAL_SIZE"))
    return local > 1 or number("SLURM_STEP_NUM_TASKS") > number("SLURM_STEP_NUM_NODES")


def _started_several(launcher: str, size: str, rank: str, variables: Mapping[str, str]) -> bool:
    """Whether the launcher has started this process as one of several."""
    count = variables.get(size, "")
    if not count.isdecimal() or int(count) < 2 or rank not in variables:
        return False
    if launcher == "torchrun":  # otherwise a notebook cell has set them, as in torch's tutorials
        return "JPY_PARENT_PID" not in variables or "TORCHELASTIC_RUN_ID" in variables
    if launcher == "srun":
        step = variables.get("SLURM_STEP_ID", variables.get("SLURM_STEPID"))
        if step == INTERACTIVE_STEP or "SLURM_PTY_PORT" in variables:  # a shell, also of `srun --pty`
            return False
        if size == "SLURM_NTASKS":  # of the allocation; a batch script is process 0 of no step
            return "SLURM_STEP_NUM_TASKS" not in variables and (step is not None or variables[rank] != "0")
    return True


def _inherited() -> dict[str, str]:
    """The variables that this process was started with and still has: a notebook may have set others for itself."""
    given = host.start_environment()
    if given is None:
        return dict(os.environ)
    return {name: value for name, value in os.environ.items() if given.get(name) == value}
