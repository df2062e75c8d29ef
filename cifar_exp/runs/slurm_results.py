"""Wait for the Slurm jobs of a sweep and collect their results."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from cifar_exp.config.arguments import argument
from cifar_exp.errors import Stopped, WorkerError
from cifar_exp.system import slurm
from cifar_exp.system.printable import print_notice, printable

if TYPE_CHECKING:
    from cifar_exp.runs.slurm_launcher import Submission

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
    """Wait until all jobs, which are submitted, have ended, and print a line for each.

    Returns:
        Their results in this order. A job that has left Slurm's queue without a result has failed.
    """
    done: dict[int, JobReturn] = {}
    left: dict[str, float] = {}  # job id -> when it was first missing in the queue
    pause, asked = ASK_SECONDS[0], time.monotonic()
    while waiting := [one for one in submissions if one.number not in done]:
        for one in waiting:
            assert one.job
            if one.job.paths.result_pickle.exists():
                done[one.number] = _result(one)
            elif time.monotonic() - left.get(one.job.job_id, time.monotonic()) > LATE_SECONDS:
                done[one.number] = _lost(one)
            if one.number in done:
                _print_end(one, done[one.number])
        if time.monotonic() - asked > pause:
            queue = slurm.queued_jobs()
            pause, asked = min(2 * pause, ASK_SECONDS[1]), time.monotonic()
            if queue is not None:  # else Slurm's controller is down, and jobs run on
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
        return _failed(one, f"it could not begin: {' '.join(last)}. Its output is in {one.job.paths.stdout}")


def _lost(one: "Submission") -> JobReturn:
    """The result of a job that Slurm has ended: a failure with Slurm's reason."""
    assert one.job
    state = slurm.job_facts(one.job.job_id).get("JobState", "unknown")
    reason = f"it ended without a result, Slurm's state is {state}. "
    if state == "TIMEOUT":
        reason += "Set hydra.launcher.time to more minutes"
    elif state == "OUT_OF_MEMORY":
        reason += "Set hydra.launcher.mem_gb to more"
    else:
        reason += f"Its output is in {one.job.paths.stdout}"
    return _failed(one, reason)


def _failed(one: "Submission", reason: str) -> JobReturn:
    assert one.job
    failure = WorkerError(f"Slurm job {one.job.job_id}: {reason}")
    hydra = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(one.folder)}}})
    return JobReturn(list(one.overrides), hydra_cfg=hydra, status=JobStatus.FAILED, _return_value=failure)


def _print_end(one: "Submission", result: JobReturn) -> None:
    assert one.job
    if result.status == JobStatus.FAILED:
        print_notice(f"job {one.number} failed: {result._return_value}")
    else:
        print(f"job {one.number} finished: {printable(' '.join(one.overrides))}", flush=True)
