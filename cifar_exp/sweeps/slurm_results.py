"""Wait for the Slurm jobs of a sweep and collect their results."""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from cifar_exp.config.arguments import argument
from cifar_exp.errors import CifarExpError, Stopped, WorkerError
from cifar_exp.system import slurm
from cifar_exp.system.printable import print_notice, printable
from cifar_exp.system.redaction import masked

if TYPE_CHECKING:
    from cifar_exp.sweeps.slurm_launcher import Submission

LOOK_SECONDS = 1.0  # between two looks for results in the folder
ASK_SECONDS = (5.0, 60.0)  # between two questions to Slurm, at first and at last
LATE_SECONDS = 15.0  # a network file system may show a result after its job has left the queue
SAVING_SECONDS = 10.0  # after a signal, ranks get 7 to save


@contextmanager
def cancelled_on_stop(submissions: "Sequence[Submission]", sweep_dir: Path) -> Iterator[None]:
    """Cancel the Slurm jobs if a signal stops the block, and wait a moment until the running ones have saved."""
    try:
        yield
    except Stopped:
        jobs = {one.job.job_id for one in submissions if one.job and not one.job.paths.result_pickle.exists()}
        if jobs:
            is_done = slurm.cancel(sorted(jobs))
            how = f"the same command with {argument('resume', str(sweep_dir))} continues"
            names = ", ".join(sorted({job.partition("_")[0] for job in jobs}))
            if is_done:
                print_notice(f"the jobs of Slurm job {names} are cancelled; running ones save, and {how}")
            else:
                print_notice(f"Slurm did not answer. Run scancel {names.replace(',', '')}; {how}")
            deadline = time.monotonic() + SAVING_SECONDS
            while is_done and jobs & (slurm.queued_jobs() or set()) and time.monotonic() < deadline:
                time.sleep(LOOK_SECONDS)
        raise


def results(submissions: "Sequence[Submission]") -> list[JobReturn]:
    """Wait until all jobs have ended, and print a line for each.

    Returns:
        Their results in this order. A job that has left Slurm's queue without a result has failed.
    """
    common = set.intersection(*(set(one.overrides) for one in submissions))
    done = {one.number: _failed(one, one.refusal) for one in submissions if one.refusal}
    for refusal in {str(one.refusal) for one in submissions if one.refusal}:
        print_notice(refusal)
    left: dict[str, float] = {}  # job id -> when it was first missing in the queue
    pause, asked = ASK_SECONDS[0], time.monotonic()
    while waiting := [one for one in submissions if one.number not in done]:
        for one in waiting:
            assert one.job
            if one.job.paths.result_pickle.exists():
                done[one.number] = _result(one)
            elif time.monotonic() - left.get(one.job.job_id, time.monotonic()) > LATE_SECONDS:
                done[one.number] = _ended_by_slurm(one)
            if one.number in done:
                _print_end(one, done[one.number], common)
        if time.monotonic() - asked > pause:
            queue = slurm.queued_jobs()
            pause, asked = min(2 * pause, ASK_SECONDS[1]), time.monotonic()
            if queue is None:  # the jobs run on
                print_notice("Slurm does not answer; the sweep waits for its jobs")
            else:
                gone = {one.job.job_id for one in waiting if one.job} - queue
                left = {job: left.get(job, asked) for job in gone}
        time.sleep(LOOK_SECONDS)
    return [done[one.number] for one in submissions]


def _result(one: "Submission") -> JobReturn:
    """The result that a job has written; a failure if the job could not begin."""
    assert one.job
    try:
        return one.job.result()
    except Exception as error:
        last = str(error).strip().splitlines()[-1:]
        return _lost(one, f"it could not begin: {' '.join(last)}. Its output is in {one.job.paths.stdout}")


def _ended_by_slurm(one: "Submission") -> JobReturn:
    """The result of a job that has left the queue without one: a failure with Slurm's reason."""
    assert one.job
    state = slurm.job_facts(one.job.job_id).get("JobState", "unknown")
    remedy = {
        "TIMEOUT": "Set hydra.launcher.time to more minutes",
        "OUT_OF_MEMORY": "Set hydra.launcher.mem_gb to more",
    }.get(state, f"Its output is in {one.job.paths.stdout}")
    return _lost(one, f"it ended without a result, in Slurm's state {state}. {remedy}")


def _lost(one: "Submission", reason: str) -> JobReturn:
    assert one.job
    return _failed(one, WorkerError(f"Slurm job {one.job.job_id}: {reason}"))


def _failed(one: "Submission", failure: CifarExpError) -> JobReturn:
    hydra = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(one.folder)}}})
    return JobReturn(list(one.overrides), hydra_cfg=hydra, status=JobStatus.FAILED, _return_value=failure)


def _print_end(one: "Submission", result: JobReturn, common: Collection[str]) -> None:
    """Print what has become of a job. ``common``: overrides of all jobs, which are left out."""
    own = printable(" ".join(masked([override for override in one.overrides if override not in common])))
    if result.status == JobStatus.FAILED:
        print_notice(f"job {one.number} failed: {result._return_value}")
    else:
        print(f"job {one.number} finished{': ' * bool(own)}{own}", flush=True)
