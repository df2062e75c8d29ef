"""Set up and end one rank's process."""

import atexit
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from cifar_exp.distributed import process_group
from cifar_exp.distributed.process_group import World
from cifar_exp.distributed.rank_control import RankControl
from cifar_exp.errors import CifarExpError
from cifar_exp.system import host
from cifar_exp.system.printable import print_notice
from cifar_exp.system.process import keep_freed_memory
from cifar_exp.system.signals import leave_signals_to_parent
from cifar_exp.system.standard_streams import ignore_broken_output
from cifar_exp.worker.failure import RankFailure
from cifar_exp.worker.job import Job
from cifar_exp.worker.restart import restarted

DEAD_PEER_PATIENCE = 2.0  # seconds


def run_in_rank_process(job: Job, ipc_dir: Path, work: Callable[[Job, World, RankControl], None]) -> None:
    """Set up a rank's process, join the process group, do the rank's work, and report a failure to the launcher.

    Args:
        job: the run.
        ipc_dir: a private folder that ranks and launcher share: rendezvous, heartbeats, failures, stop requests.
        work: called after this rank has its device and has joined the process group.
    """
    begin_rank()
    gc.freeze()  # the garbage collector skips what the fork server has imported
    gc.enable()
    rank, attempt = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    try:
        if job.place:
            rank += job.place.first_rank
        assert int(os.environ["WORLD_SIZE"]) == _local_size(job)
        steps_between_waits = 1 if job.accelerator == "cpu" else job.train.log_every
        control = RankControl(ipc_dir, job.run_dir, rank, steps_between_waits, _seconds_left(job), bool(job.place))
        if attempt:
            job = _restarted(job, ipc_dir, rank, attempt)
        _prepare_process(job)
        # Longer than launcher.timeout: the launcher ends hung ranks first, since it can name them.
        with process_group.joined_world(job.accelerator, ipc_dir, 2 * job.timeout + 60, job.place) as world:
            work(job, world, control)
        control.done()
        end_rank()
    except Exception as error:
        if not ipc_dir.exists():  # the launcher was stopped before it registered this rank: nobody reads a report
            os._exit(1)
        _report_failure_and_exit(error, job, ipc_dir, rank, attempt)


def _report_failure_and_exit(error: Exception, job: Job, ipc_dir: Path, rank: int, attempt: int) -> None:
    code = error.exit_code if isinstance(error, CifarExpError) else None
    failure = RankFailure(rank, time.time(), code, f"{type(error).__name__}: {error}", traceback.format_exc())
    failure.save(ipc_dir, attempt)
    if code is None and job.plan.world_size > 1:
        # The cause may be another rank that was killed and left no report. Wait, so that the launcher notices that
        # rank first. It then ends this one.
        time.sleep(DEAD_PEER_PATIENCE)
    sys.exit(1 if code is None else code)


def _local_size(job: Job) -> int:
    """Ranks on this host."""
    return job.place.local_size if job.place else job.plan.world_size


def begin_rank() -> None:
    """Exit when the parent exits, and leave signals to it."""
    host.end_with_parent()
    ignore_broken_output()
    leave_signals_to_parent()


def end_rank() -> None:
    """Skip interpreter shutdown in a spawned rank; forked ranks skip it anyway.

    Shutdown aborts if a gloo thread is in a Python callback.
    """
    if host.start_method() == "spawn":
        atexit.register(os._exit, 0)


def _seconds_left(job: Job) -> float | None:
    limit = job.train.max_seconds
    return None if limit is None else limit - (time.monotonic() - job.started)


def _restarted(job: Job, ipc_dir: Path, rank: int, attempt: int) -> Job:
    """The job after a rank died: it resumes from the newest valid checkpoint.

    Raises:
        CifarExpError: the error that ended the previous attempt, if it would happen again.
    """
    for failure in RankFailure.of_attempt(ipc_dir, attempt - 1):
        failure.raise_if_lasting()
    return restarted(job, attempt, print_notice if rank == 0 else lambda _line: None)


def _prepare_process(job: Job) -> None:
    _pin_to_cores(job)
    torch.set_num_threads(job.threads)
    if job.accelerator == "cpu":
        keep_freed_memory()
    # All batches have the same shape, so benchmarking the algorithms pays off. The choice may differ between runs.
    torch.backends.cudnn.benchmark = not job.train.deterministic
    if job.train.precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False  # on by default for convolutions
    if job.train.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is repeatable only with a fixed workspace
        torch.use_deterministic_algorithms(mode=True)


def _pin_to_cores(job: Job) -> None:
    """Pin each CPU rank to cores of its own if the ranks use all cores.

    Threads that migrate between cores lose their caches. A run that leaves cores free is not pinned: another run would
    choose the same cores. Threads that start later inherit the cores.
    """
    cores = host.own_cores()
    if job.accelerator == "cpu" and _local_size(job) * job.threads == len(cores):
        first = int(os.environ["LOCAL_RANK"]) * job.threads
        host.keep_to_cores(cores[first : first + job.threads])
