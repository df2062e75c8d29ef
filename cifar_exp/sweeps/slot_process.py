"""The side of a packed sweep that runs in a slot's process: take the slot's devices, run a job, return its result."""

import os
import pickle
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cifar_exp.errors import CifarExpError, Stopped
from cifar_exp.system.bugs import described
from cifar_exp.system.host import keep_to_cores
from cifar_exp.system.signals import STOPPING, install_signal_handlers, leave_signals_to_parent
from cifar_exp.system.standard_streams import ignore_broken_output

WATCH_SECONDS = 0.25


def begin_slot(cores: Sequence[int], parent: int) -> None:
    """Keep this process and its children to ``cores``, and end it when its parent ends.

    The kernel's own signal at a parent's death is not used: it comes when the thread that started this process ends.
    """
    leave_signals_to_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # blocked while this process was started
    threading.Thread(target=_end_after, args=(parent,), name="parent", daemon=True).start()
    keep_to_cores(list(cores))
    ignore_broken_output()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def run_here(
    context: HydraContext,
    task: TaskFunction,
    config: DictConfig,
    state: Mapping[Any, Any],
    answered: Sequence[int],
) -> tuple[JobReturn, int | None]:
    """Run one job in this process.

    Args:
        context: Hydra's.
        task: is called with the job's configuration.
        config: the composed configuration of the job.
        state: of Hydra's singletons and of the resolvers.
        answered: the signals that stop the job; it saves first.

    Returns:
        What Hydra returns for the job, and the signal that stopped it, if one did.
    """
    setup_globals()
    Singleton.set_state(dict(state))
    for number in answered:
        signal.signal(number, signal.SIG_DFL)
    install_signal_handlers()
    try:
        job = run_job(
            hydra_context=context,
            task_function=lambda composed: task(_quiet(composed)),
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
    finally:
        leave_signals_to_parent()
    stopped = Stopped.cause_of(job._return_value) if job.status == JobStatus.FAILED else None
    if job.status == JobStatus.FAILED:
        job._return_value = _portable(job._return_value)
    return job, stopped.number if stopped else None


def _quiet(composed: DictConfig) -> DictConfig:
    """The configuration, with ``progress=quiet`` unless another was chosen: lines of several jobs would mix."""
    if OmegaConf.select(composed, "progress") == "auto":
        with read_write(composed), open_dict(composed):
            composed.progress = "quiet"
    return composed


def _portable(error: BaseException) -> BaseException:
    """``error``, or one with its description if pickle would change it."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # classes whose arguments are not those of their constructor raise anything
        copy = None
    return error if type(copy) is type(error) and str(copy) == str(error) else CifarExpError(described(error))
