"""The job after its ranks failed: training resumes from the newest valid checkpoint."""

from collections.abc import Callable
from dataclasses import replace

from cifar_exp.records import checkpoint
from cifar_exp.worker.job import Job


def restarted(job: Job, attempt: int, report: Callable[[str], None]) -> Job:
    """The job of another attempt.

    Args:
        job: the job of the attempts before.
        attempt: the number of restarts so far, this one included.
        report: prints a line for the user.
    """
    manifest = checkpoint.newest_intact_manifest(job.run_dir, report)
    start = f"step {manifest.step}" if manifest else "the beginning" if job.resume_from is None else "where it started"
    report(f"a rank died or hung; restart {attempt}: training resumes from {start}")
    # Steps after the checkpoint are trained again. The time of the lost steps counts as start-up.
    return replace(job, resume_from=(job.run_dir, manifest), elapsed=manifest.seconds) if manifest else job
