"""Setting up and ending one rank's process."""

import atexit
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from cifar_exp.distributed import process_group
from cifar_exp.distributed.heartbeat import Control
from cifar_exp.distributed.process_group import World
from cifar_exp.errors import CifarExpError
from cifar_exp.records import checkpoint
from cifar_exp.system import host
from cifar_exp.system.process import keep_freed_memory
from cifar_exp.worker.failure import RankFailure
from cifar_exp.worker.job import Job

DEAD_PEER_PATIENCE = 2.0  # seconds


def live(job: Job, exchange: Path, work: Callable[[Job, World, Control], None]) -> None:
    """The whole life of a started process.

    Args:
        job: what to do.
        exchange: a private folder in which ranks find each other, leave word of a failure, and are told to end.
        work: done once this rank has its device and knows the others.
    """
    begin_rank()
    gc.freeze()  # what the nursery has imported stays, and is no longer looked through
    gc.enable()
    rank, attempt = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    try:
        control = Control(exchange, job.run_dir, rank, _steps_between_waits(job), _seconds_left(job))
        if attempt:
            job = _restarted(job, exchange, rank, attempt)
        _prepare_process(job)
        # Longer than the launcher's patience, which knows better who is to blame.
        with process_group.joined_world(job.accelerator, exchange, 2 * job.timeout + 60) as world:
            work(job, world, control)
        control.done()
        end_rank()
    except Exception as error:
        if not exchange.exists():  # the launcher was stopped before it knew of this rank, and nobody is to hear of it
            os._exit(1)
        code = error.exit_code if isinstance(error, CifarExpError) else None
        failure = RankFailure(rank, time.time(), code, f"{type(error).__name__}: {error}", traceback.format_exc())
        failure.save(exchange, attempt)
        if code is None and int(os.environ["WORLD_SIZE"]) > 1:
            # It may only be the echo of a peer that was killed and could leave no word: let the launcher see that
            # one first. It ends this rank as soon as it does.
            time.sleep(DEAD_PEER_PATIENCE)
        sys.exit(1 if code is None else code)


def begin_rank() -> None:
    """In a rank: it ends with its parent, and Ctrl-C, which reaches every process of the terminal, is its parent's."""
    host.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def end_rank() -> None:
    """Called when a rank's work is done: it ends without Python's finalisation, as one that was forked does.

    That would abort a thread of gloo's which is still at a callback of Python's.
    """
    if host.start_method() == "spawn":  # forked processes call nothing at their exit
        atexit.register(os._exit, 0)


def _steps_between_waits(job: Job) -> int:
    return 1 if job.accelerator == "cpu" else job.train.log_every


def _seconds_left(job: Job) -> float | None:
    limit = job.train.max_seconds
    return None if limit is None else limit - (time.monotonic() - job.started)


def _restarted(job: Job, exchange: Path, rank: int, attempt: int) -> Job:
    """The job after a rank died: it goes on from the newest checkpoint that is sound.

    Raises:
        CifarExpError: the one that ended the attempt before, where it would come again.
    """
    for failure in RankFailure.of_attempt(exchange, attempt - 1):
        failure.raise_if_lasting()

    def tell(line: str) -> None:
        if rank == 0:
            print(line, file=sys.stderr, flush=True)

    manifest = checkpoint.sound(job.run_dir, tell)
    after = f"step {manifest.step}" if manifest else "the beginning" if job.resume_from is None else "where it started"
    tell(f"cifar-exp: a rank died or hung; restart {attempt}: training goes on from {after}")
    # What was trained since is trained again: that time is start-up.
    return replace(job, resume_from=(job.run_dir, manifest), elapsed=manifest.seconds) if manifest else job


def _prepare_process(job: Job) -> None:
    _pin(job)
    torch.set_num_threads(job.threads)
    if job.accelerator == "cpu":
        keep_freed_memory()
    # Batches keep their shape, for which the fastest algorithms are worth finding: others may be found another time.
    torch.backends.cudnn.benchmark = not job.train.deterministic
    if job.train.precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False  # on by default for convolutions
    if job.train.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS is repeatable only with a fixed workspace
        torch.use_deterministic_algorithms(mode=True)


def _pin(job: Job) -> None:
    """Keep each CPU rank on cores of its own, where the ranks take all of them.

    Threads that wander evict each other's caches. A run that leaves cores free is left to the system: another run would
    choose the same ones. Threads that are started from now on inherit it.
    """
    cores = host.own_cores()
    if job.accelerator == "cpu" and job.plan.world_size * job.threads == len(cores):
        first = int(os.environ["LOCAL_RANK"]) * job.threads
        host.keep_to_cores(cores[first : first + job.threads])
