"""Ask Slurm about jobs, requeue and cancel them, by its own commands. Slurm's accounting is not needed."""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

ANSWER_SECONDS = 60.0
JOB_ID = "SLURM_JOB_ID"
KEPT = ("SLURM_CONF",)  # where the cluster is


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
    return _asked("scancel", *jobs) is not None


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


def _asked(*command: str) -> str | None:
    """The output of a command of Slurm's; None if it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=ANSWER_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
