"""Hydra's launcher for jobs that need fewer devices than there are: they run side by side, each on its own devices."""

import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cifar_exp.errors import ConfigError, WorkerError
from cifar_exp.sweeps.packing import ALONE, GPU_VARIABLE, Slot, check_devices, estimated_work, plan_slots
from cifar_exp.sweeps.slot_process import begin_slot, run_here
from cifar_exp.system.bugs import as_user_error
from cifar_exp.system.import_path import SafeHelpers
from cifar_exp.system.printable import print_notice, printable
from cifar_exp.system.redaction import masked, masked_text
from cifar_exp.system.signals import REPEAT_SECONDS, blocked_signals, signals_to_answer

WARNINGS = "PYTHONWARNINGS"


@dataclass(frozen=True)
class PackedJob:
    """A composed job.

    Attributes:
        number: its number in the sweep.
        overrides: its overrides.
        config: its configuration.
        title: the overrides that it does not share with all other jobs, for a line on the terminal.
    """

    number: int
    overrides: tuple[str, ...]
    config: DictConfig
    title: str


class SlotProcess:
    """The process of a slot, with joblib's executor. It is started for the first job, and again after it died."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot
        self._executor: Any = None

    def submit(self, *call: Any) -> Any:
        """Call a function in the process. Returns the future."""
        if self._executor is None:
            from joblib.externals.loky import ProcessPoolExecutor

            variables = {} if self.slot.gpus is None else {GPU_VARIABLE: self.slot.gpus}
            start = (list(self.slot.cores), os.getpid())
            self._executor = ProcessPoolExecutor(1, initializer=begin_slot, initargs=start, env=variables)
        with blocked_signals(), SafeHelpers(), _quiet_trackers():
            return self._executor.submit(*call)

    def pids(self) -> list[int]:
        return list(getattr(self._executor, "_processes", None) or ())

    def end(self) -> None:
        """End the process and its children."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=True, kill_workers=True)


class PackedLauncher(Launcher):
    """Runs the jobs of a sweep side by side on disjoint cores or GPUs, the longest first.

    All jobs need the same devices. The devices of the machine are divided into slots of that size, and each slot has a
    process that sees only its own devices. A process that dies ends its job; the other jobs continue.
    """

    def __init__(self, n_jobs: int | None = None) -> None:
        """``n_jobs``: the largest number of jobs at a time; None: as many as there are devices for."""
        self.n_jobs = n_jobs
        self._slots: list[SlotProcess] = []
        self._free: SimpleQueue[SlotProcess] = SimpleQueue()
        self._is_stopping = False
        self._lock = threading.Lock()  # for Hydra's global state, and this process's environment

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep Hydra's objects.

        Raises:
            ConfigError: joblib is not installed.
        """
        try:
            import joblib  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"hydra/launcher=packed: it needs the package joblib, which is not installed. {ALONE}, or install it: "
                f"pip install 'cifar-exp[packed]'"
            ) from error
        self._context, self._task, self._config = hydra_context, task_function, config

    def check(self, jobs: Sequence[Sequence[str]], configs: Sequence[DictConfig]) -> None:  # noqa: ARG002
        """Check the jobs of a sweep before the first one starts.

        Args:
            jobs: the overrides of each job.
            configs: the section ``devices`` of each.

        Raises:
            ConfigError: their devices differ.
            MachineError: the machine has fewer devices than a job needs.
        """
        check_devices(configs, self.n_jobs)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs. Returns their results in the order of ``job_overrides``."""
        with self._lock:
            setup_globals()
            Path(str(self._config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
            shared = set.intersection(*map(set, job_overrides)) if len(job_overrides) > 1 else set()
            jobs = [self._job(initial_job_idx + place, job, shared) for place, job in enumerate(job_overrides)]
            self._make_slots(jobs)
        longest_first = sorted(jobs, key=lambda job: estimated_work(job.config), reverse=True)
        with ThreadPoolExecutor(len(self._slots)) as threads:
            futures = {job.number: threads.submit(self._run, job) for job in longest_first}
            try:
                return [futures[job.number].result() for job in jobs]
            except BaseException:
                self._is_stopping = True
                threads.shutdown(wait=False, cancel_futures=True)
                self.end_processes()
                raise

    def processes_to_stop(self) -> list[int]:
        """The processes of the jobs, for a signal. No further job starts."""
        self._is_stopping = True
        return [pid for process in self._slots for pid in process.pids()]

    def end_processes(self) -> None:
        """End the processes of all slots."""
        for process in self._slots:
            process.end()

    def _make_slots(self, jobs: Sequence[PackedJob]) -> None:
        if self._slots:
            return
        self._slots = [SlotProcess(slot) for slot in plan_slots([job.config for job in jobs], self.n_jobs)]
        for process in self._slots:
            self._free.put(process)
        if self._is_shown() and len(jobs) > 1:
            places = "; ".join(str(process.slot) for process in self._slots)
            print(f"{len(self._slots)} jobs at a time, each on its own devices: {places}", flush=True)

    def _is_shown(self) -> bool:
        return bool(OmegaConf.select(self._config, "progress", default="quiet") != "quiet")

    def _job(self, number: int, overrides: Sequence[str], shared: AbstractSet[str]) -> PackedJob:
        config = self._context.config_loader.load_sweep_config(self._config, list(overrides))
        with read_write(config), open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        own = [override for override in overrides if override not in shared]
        return PackedJob(number, tuple(overrides), config, printable(" ".join(masked(own))))

    def _run(self, job: PackedJob) -> JobReturn:
        """Run a job in the process of a free slot. Called in a thread."""
        process = self._free.get()
        try:
            return self._run_in(process, job)
        finally:
            self._free.put(process)

    def _run_in(self, process: SlotProcess, job: PackedJob) -> JobReturn:
        if self._is_stopping:
            raise CancelledError
        if self._is_shown():
            print(f"== job {job.number} on {process.slot}: {job.title}", flush=True)
        from joblib.externals.loky.process_executor import BrokenProcessPool

        with self._lock:
            answered = [int(number) for number in signals_to_answer()]
            future = process.submit(run_here, self._context, self._task, job.config, Singleton.get_state(), answered)
        done: JobReturn
        began = time.monotonic()
        try:
            done, stopped = future.result()
        except BrokenProcessPool as error:
            with self._lock:
                process.end()
            return self._lost(job, f"its process ended{_how(error)}, perhaps for lack of memory")
        except Exception as error:  # what the job returns cannot be pickled, or this process ends
            if not self._is_stopping:
                print_notice(masked_text(f"job {job.number} failed: {as_user_error(error)}"))
            return self._failed(job, error)
        if stopped is not None:
            time.sleep(REPEAT_SECONDS)  # a signal to all processes may have arrived here later
            return self._lost(job, f"its process was stopped by signal {stopped}")
        if self._is_shown() and isinstance(done._return_value, float):
            seconds = time.monotonic() - began
            print(f"== job {job.number}: done in {seconds:.0f} s, test accuracy {done._return_value:.4f}", flush=True)
        return done

    def _lost(self, job: PackedJob, why: str) -> JobReturn:
        message = f"{why}. The same command with resume=auto continues the job from its last checkpoint"
        if not self._is_stopping:
            print_notice(f"job {job.number} failed: {message}")
        return self._failed(job, WorkerError(message))

    def _failed(self, job: PackedJob, error: BaseException) -> JobReturn:
        with self._lock, _current(job.config):
            sweep = job.config.hydra.sweep
            folder = Path(str(sweep.dir), str(sweep.subdir)).absolute()
        runtime = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(folder)}}})
        done = JobReturn(overrides=list(job.overrides), hydra_cfg=runtime, working_dir=str(folder))
        done.status, done._return_value = JobStatus.FAILED, error
        return done


@contextmanager
def _current(config: DictConfig) -> Iterator[None]:
    """Inside this context ``config`` is Hydra's configuration: names of folders may refer to it."""
    state = HydraConfig.instance()
    before = state.cfg
    try:
        state.set_config(config)
        yield
    finally:
        state.cfg = before


@contextmanager
def _quiet_trackers() -> Iterator[None]:
    """Python's resource tracker, if it starts in the block, does not warn of what a killed process left to it."""
    before = os.environ.get(WARNINGS)
    os.environ[WARNINGS] = ",".join(filter(None, (before, "ignore:resource_tracker")))
    try:
        yield
    finally:
        del os.environ[WARNINGS]
        if before is not None:
            os.environ[WARNINGS] = before


def _how(error: BaseException) -> str:
    """The exit code or signal in joblib's message about a process that died; empty if it has none."""
    found = re.search(r"exit codes? of the workers? (?:is|are) \{(.+?)\}", str(error))
    return f" by {found[1]}" if found else ""
