"""Run a function on N ranks with torch elastic; handle failures and signals; leave no process behind."""

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cifar_exp.distributed.stop_requests import INTERRUPT_FILE, Request, ended_by
from cifar_exp.errors import CifarExpError, Stopped, StorageError, WorkerError, storage_errors
from cifar_exp.launch import rank_processes
from cifar_exp.launch.watchdog import Watchdog
from cifar_exp.system import host
from cifar_exp.system.printable import tell
from cifar_exp.system.signals import answer_once, is_repeated, other_handler, raise_swallowed, signals_to_answer
from cifar_exp.system.temp_folder import private_folder
from cifar_exp.worker.failure import RankFailure
from cifar_exp.worker.job import Job

AFTER_A_DEATH = (
    "Set resume=auto to continue from the last checkpoint, or launcher.max_restarts=3 to restart automatically in "
    "later runs"
)
DEATHS = {
    signal.SIGBUS: f": {host.SHARED_MEMORY} or a disk is full, or a file that is mapped into memory was cut",
    signal.SIGXFSZ: ": ulimit -f does not allow files of this size",
}
GRACE_SECONDS = 7.0  # seconds after a signal in which ranks may finish their step and save


class Launcher(Protocol):
    """The interface of a `_target_` in ``conf/launcher``.

    Attributes:
        timeout: seconds in which no rank sends a heartbeat; then the hung rank is killed.
    """

    timeout: float

    def launch(self, function: Callable[[Job, Path], None], job: Job) -> Request | None:
        """Run ``function`` on every rank until all have succeeded.

        Args:
            function: called in each rank with the job and the folder that ranks and launcher share.
            job: the description of the work.

        Returns:
            The reason if training ended before its last step; else None.
        """
        ...


@dataclass(frozen=True)
class ElasticLauncher:
    """Starts the ranks as processes of this machine with torch elastic.

    Attributes:
        timeout: seconds in which no rank sends a heartbeat (one per step or evaluated batch); then the hung rank is
            killed.
        max_restarts: how many times all ranks are restarted after one died or hung. Training then resumes from the last
            checkpoint.
    """

    timeout: float
    max_restarts: int

    def launch(self, function: Callable[[Job, Path], None], job: Job) -> Request | None:
        """Run ``function(job, ipc_dir)`` in ``job.plan.world_size`` processes.

        On SIGINT, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2 the ranks finish their step and save. They are killed at a second
        signal or after ``GRACE_SECONDS`` seconds.

        Args:
            function: called in each rank with the job and the folder that ranks and launcher share.
            job: the description of the work; it is pickled.

        Returns:
            The reason if training ended before its last step; else None.

        Raises:
            WorkerError: a rank raised, died or hung, and no restart is left. The message has the traceback of the rank
                that failed first.
            CifarExpError: a rank raised this error, which the user can fix.
            StorageError: the temporary folder cannot be written, or was removed while the ranks trained.
            Stopped: one of these signals arrived; all ranks have ended.
        """
        raise_swallowed()
        # Ranks find each other through files in a folder of mode 0700. The TCP stores of elastic and torch would listen
        # on all interfaces without authentication.
        with _shared_folder() as ipc_dir:
            os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else the agent opens a TCP store
            _log_to_the_runs_file()
            _name_callers_cheaply()
            watchdog, stopped = Watchdog(ipc_dir, job.plan.world_size, self.timeout), list[Stopped]()
            try:
                with watchdog, rank_processes.starting_ranks(), _stopping_in_order(ipc_dir, stopped):
                    elastic_launch(self._config(job.plan.world_size, ipc_dir), function)(job, ipc_dir)
            except OSError:
                if _is_removed(ipc_dir):
                    raise _removed(ipc_dir) from None
                raise
            except ChildFailedError as error:
                failure = _first_failure(error, ipc_dir, watchdog, self.max_restarts)
                if not stopped:
                    raise failure from None
                if not isinstance(failure, WorkerError):  # a WorkerError is the effect of the signal
                    tell(failure)
                raise stopped[0] from None
            except SignalException as error:
                if stopped:
                    raise stopped[0] from None
                if _is_removed(ipc_dir):
                    raise _removed(ipc_dir) from None
                if watchdog.vanished:
                    raise _vanished(watchdog) from None
                raise Stopped(error.sigval) from None
            except Stopped as error:
                rank_processes.kill_ranks()
                raise (stopped[0] if stopped else error) from None
            finally:
                _end_ranks()
            return ended_by(ipc_dir)

    def _config(self, world_size: int, ipc_dir: Path) -> LaunchConfig:
        """How torch elastic starts ``world_size`` ranks that meet in the folder ``ipc_dir``."""
        return LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world_size,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=str(ipc_dir / "rendezvous"),
            rdzv_configs={"store_type": "file"},
            max_restarts=self.max_restarts,
            local_addr="127.0.0.1",
            start_method=host.start_method(),
            logs_specs=DefaultLogsSpecs(log_dir=str(ipc_dir / "logs")),
            # This launcher answers the signals that ask a run to end. Elastic's handlers raise an exception, and parts
            # of elastic catch it. They also end a run under nohup.
            signals_to_handle="SIGQUIT",
        )


@contextmanager
def _shared_folder() -> Iterator[Path]:
    """A private folder for ranks and launcher.

    Raises:
        StorageError: the temporary folder cannot be written.
    """
    with ExitStack() as stack:
        with storage_errors(Path(tempfile.gettempdir()), "Set TMPDIR=<a folder that you may write to>"):
            folder = stack.enter_context(private_folder())
        yield folder


def _is_removed(ipc_dir: Path) -> bool:
    """Whether the ranks' folder was removed, or that of the fork server's socket."""
    sockets = multiprocessing.current_process()._config.get("tempdir")  # type: ignore[attr-defined]
    return not ipc_dir.exists() or (sockets is not None and not Path(sockets).exists())


def _removed(ipc_dir: Path) -> StorageError:
    return StorageError(
        f"TMPDIR={ipc_dir.parent}: folders in it that the run needs were removed while it ran. Set TMPDIR to a folder "
        f"that nothing cleans up, and resume=auto to continue from the last checkpoint"
    )


@contextmanager
def _stopping_in_order(ipc_dir: Path, received: list[Stopped]) -> Iterator[None]:
    """Stop the ranks gracefully on a signal that asks the run to end, while the context is open.

    At the first signal the ranks are asked to finish their step and save. They are killed after ``GRACE_SECONDS``
    seconds (elastic would wait half a minute for a suspended rank) or at the second signal. A handler that the program
    around this one had for the signal is called once the ranks have ended: submitit's requeues the job.

    Args:
        ipc_dir: the folder that ranks and launcher share.
        received: the first signal is appended.

    Raises:
        Stopped: the first signal, after the ranks have ended.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        received.append(Stopped(number))
        for signal_number in signals_to_answer():
            signal.signal(signal_number, end)
        answer_once(number)
        with suppress(OSError):  # the folder was removed, and the watchdog ends the ranks
            (ipc_dir / INTERRUPT_FILE).touch()
        message = "the ranks finish their step and save; a second signal ends them at once"
        tell(message)
        signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if is_repeated(received[0], number):
            return
        restore()
        rank_processes.kill_ranks()
        raise received[0]

    before: dict[int, Any] = {number: signal.signal(number, ask) for number in signals_to_answer()}

    def restore() -> None:
        for number in signals_to_answer():
            signal.signal(number, before[number])

    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        restore()
        if received and (handler := other_handler(before[received[0].number])):
            handler(received[0].number, None)
    if received:
        raise received[0]


def _log_to_the_runs_file() -> None:
    """Send elastic's log of failing workers to the run's log only. The user gets one message from this launcher."""
    for name in ("torch.distributed", "torch.distributed.elastic", "torch.multiprocessing"):
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.handlers = list(logging.getLogger().handlers)


def _name_callers_cheaply() -> None:
    """Name the caller of each rendezvous event by its frame. torch reads all frames' sources, 36 times a start."""
    if hasattr(dynamic_rendezvous, "get_method_name"):
        dynamic_rendezvous.get_method_name = _caller


def _caller(depth: int = 2) -> str:
    return sys._getframe(depth).f_code.co_name


def _end_ranks() -> None:
    """Kill ranks that still run: a signal may arrive after ranks were forked and before elastic has registered them."""
    ranks = multiprocessing.active_children()
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()


def _vanished(watchdog: Watchdog) -> WorkerError:
    message = watchdog.vanished[min(watchdog.vanished)]
    return WorkerError(f"{message}; the other ranks were ended. {AFTER_A_DEATH}")


def _first_failure(error: ChildFailedError, ipc_dir: Path, watchdog: Watchdog, max_restarts: int) -> CifarExpError:
    """The cause of a failed run.

    A killed rank leaves no failure file, and its peers fail because of it. So a rank without a file is the cause; if
    there is none, the rank that failed first is.
    """
    if _is_removed(ipc_dir):
        return _removed(ipc_dir)
    records = RankFailure.of_attempt(ipc_dir, max_restarts)
    recorded = {record.rank for record in records}
    for rank, failure in error.failures.items():
        if rank not in recorded:
            if rank in watchdog.hung:
                return WorkerError(f"{watchdog.hung[rank]}; the ranks were ended. {AFTER_A_DEATH}")
            how = f"exit code {failure.exitcode}"
            if failure.exitcode < 0:
                number = signal.Signals(-failure.exitcode)
                how = f"killed by {number.name}{DEATHS.get(number, '')}"
            return WorkerError(
                f"rank {rank} died without an error ({how}); the other ranks were ended. {AFTER_A_DEATH}"
            )
    if watchdog.vanished.keys() - recorded:  # the others failed because of it
        return _vanished(watchdog)
    first = min(records, key=lambda record: record.time)
    try:
        first.raise_if_lasting()
    except CifarExpError as lasting:
        return lasting
    return WorkerError(f"rank {first.rank} failed; the other ranks were ended\n{first.traceback}".rstrip())
