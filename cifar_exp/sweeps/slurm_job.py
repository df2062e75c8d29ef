"""One job of a sweep inside its Slurm job: it saves before Slurm ends it, and is requeued."""

import atexit
import os
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from cifar_exp.config.reading import register_resolvers
from cifar_exp.errors import CifarExpError, Stopped
from cifar_exp.system import slurm
from cifar_exp.system.bugs import BugError, as_user_error
from cifar_exp.system.printable import print_notice
from cifar_exp.system.process import allow_open_files
from cifar_exp.system.redaction import masked_text
from cifar_exp.system.scheduler import RESTARTS
from cifar_exp.system.signals import (
    ignore_signals,
    install_signal_handlers,
    raise_stopped,
    signals_to_answer,
    swallowed,
)
from cifar_exp.system.standard_streams import flush_output

BEFORE_THE_END = (signal.SIGUSR1, signal.SIGUSR2)  # Slurm sends them some time before it ends the job


@dataclass
class SlurmJob:
    """What submitit pickles, and calls in the Slurm job.

    Attributes:
        hydra_context, task_function, config: Hydra's, for all jobs of the sweep.
        max_requeues: number of restarts after which a job at its time limit is not requeued.
    """

    hydra_context: HydraContext
    task_function: TaskFunction
    config: DictConfig
    max_requeues: int

    def __call__(self, overrides: Sequence[str], number: int, state: dict[Any, Any]) -> JobReturn:
        """Run the job.

        Args:
            overrides: those of the job.
            number: its number in the sweep.
            state: Hydra's global objects in the process that submitted the job.

        Returns:
            Hydra's result. A job that a signal stopped ends the process instead: without a result, the submitting
            process asks Slurm what has become of the job.
        """
        install_signal_handlers()
        for signal_number in signals_to_answer():
            signal.signal(signal_number, self._answer)
        try:
            done = self._run(overrides, number, state)
            failure = done._return_value if done.status == JobStatus.FAILED else None
            if stopped := Stopped.cause_of(failure) or swallowed():
                raise stopped
        except Stopped as stopped:
            self._end(stopped)
        ignore_signals()
        return _portable(done)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        """Answer a signal while no ranks train. During an import there is nothing to save, so the process ends at once:
        an exception that goes through the import of a C++ extension, such as PyTorch's, aborts the process.
        """
        if frame is None:  # called once more after the ranks have saved
            return
        if any(_is_import(inner) for inner, _ in traceback.walk_stack(frame)):
            self._end(Stopped(number))
        raise_stopped(number)

    def _end(self, stopped: Stopped) -> NoReturn:
        ignore_signals()  # a requeued job gets SIGTERM
        _requeue_if_resumable(stopped, self.max_requeues)
        atexit._run_exitfuncs()
        flush_output()
        os._exit(stopped.exit_code)

    def checkpoint(self, *arguments: Any) -> Any:
        """What submitit requeues if a signal comes before the job was called."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)

    def _run(self, overrides: Sequence[str], number: int, state: dict[Any, Any]) -> JobReturn:
        allow_open_files()
        Singleton.set_state(state)
        setup_globals()
        register_resolvers()
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config.hydra.job):
            config.hydra.job.num, config.hydra.job.id = number, slurm.own_job()
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


def _is_import(frame: FrameType) -> bool:
    return frame.f_code.co_filename == "<frozen importlib._bootstrap>"


def _requeue_if_resumable(stopped: Stopped, most: int) -> None:
    """Requeue this Slurm job if it was stopped by its time limit or by preemption, and not by ``scancel``.

    Slurm requeues a preempted job only if it is still running when its grace time is over.
    """
    job = slurm.own_job()
    facts = slurm.job_facts(job)
    is_preempted = facts.get("PreemptTime", "None") != "None"
    if facts.get("JobState") != "RUNNING":  # Slurm has decided already
        return
    restarts = int(facts.get("Restarts", os.environ.get(RESTARTS, "0")))
    if stopped.number in BEFORE_THE_END and not is_preempted and restarts >= most:
        print_notice(f"Slurm job {job} was requeued {restarts} times, as often as hydra.launcher.max_requeues allows")
    elif stopped.number in BEFORE_THE_END or is_preempted:
        is_requeued = slurm.requeue(job)
        print_notice(f"Slurm job {job} {'is' if is_requeued else 'could not be'} requeued")


def _portable(done: JobReturn) -> JobReturn:
    """The result with an exception that can be pickled. Its traceback is in the log of the run or of the Slurm job."""
    if done.status == JobStatus.FAILED:
        problem = as_user_error(done._return_value)
        kind = CifarExpError if isinstance(problem, BugError) else type(problem)
        done._return_value = kind(masked_text(str(problem)))
    return done
