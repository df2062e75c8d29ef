"""Ask Slurm about jobs, requeue and cancel them, by its own commands. Slurm's accounting is not needed."""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

ANSWER_SECONDS = 60.0
CANCEL_SECONDS = 10.0  # the user has pressed Ctrl-C
JOB_ID = "SLURM_JOB_ID"
ARRAY, TASK = "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"
KEPT = ("SLURM_CONF",)  # where the cluster is


def own_job() -> str:
    """The id of the Slurm job that this process is part of, such as ``12`` or ``13_4``.

    Slurm numbers each job of an array, too, but the number of its last job stands for the whole array.
    """
    is_array = ARRAY in os.environ and TASK in os.environ
    return f"{os.environ[ARRAY]}_{os.environ[TASK]}" if is_array else os.environ[JOB_ID]


def queued_jobs() -> set[str] | None:
    """The ids of this user's jobs that wait, run or end, such as ``12`` and ``13_4``. None: Slurm did not answer."""
    answer = _asked("squeue", "--me", "--noheader", "--array", "--format=%i")
    return None if answer is None else set(answer.split())


def job_facts(job: str) -> dict[str, str]:
    """What Slurm says about a job, such as ``JobState`` and ``PreemptTime``. Empty for a job that it does not know."""
    words = (_asked("scontrol", "--oneliner", "show", "job", job) or "").split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def requeue(job: str) -> bool:
    """Let Slurm end the job and start it again later. Returns whether Slurm agreed."""
    return _asked("scontrol", "requeue", job) is not None


def cancel(jobs: Sequence[str]) -> bool:
    """Cancel jobs: Slurm sends SIGTERM to those that run. Returns whether Slurm agreed."""
    return _asked("scancel", *jobs, timeout=CANCEL_SECONDS) is not None


@contextmanager
def outside_of_job() -> Iterator[None]:
    """Inside this context no variable says that this process is part of a Slurm job. New jobs would inherit them."""
    hidden: Mapping[str, str] = {}
    if JOB_ID in os.environ:
        hidden = {name: os.environ[name] for name in os.environ if name.startswith("SLURM_") and name not in KEPT}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _asked(*command: str, timeout: float = ANSWER_SECONDS) -> str | None:
    """The output of a command of Slurm's; None if it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
