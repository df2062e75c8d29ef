"""Devices -> N ranks of one function on torch elastic; failures, signals, nothing left behind."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cifar_exp.distributed.heartbeat import LEAVE_FILE, Request, ended_by
from cifar_exp.errors import CifarExpError, Stopped, WorkerError
from cifar_exp.launch import forkserver
from cifar_exp.launch.watchdog import Watchdog
from cifar_exp.system import host
from cifar_exp.system.signals import answer_once, raise_swallowed, signals_to_answer
from cifar_exp.system.temp_folder import private_folder
from cifar_exp.worker.failure import RankFailure
from cifar_exp.worker.job import Job

AFTER_A_DEATH = (
    "Set resume=auto to go on from the last checkpoint, launcher.max_restarts=3 to have that done from the beginning"
)
STOP_PATIENCE = 7.0  # seconds that ranks have to end their step and save after a signal


class Launcher(Protocol):
    """What `_target_` of ``conf/launcher`` is."""

    timeout: float

    def launch(self, function: Callable[[Job, Path], None], job: Job) -> Request | None:
        """Run ``function`` on every rank and return when all have ended well; why it was early, where it was."""
        ...


@dataclass(frozen=True)
class ElasticLauncher:
    """Ranks as processes of this machine, on torch elastic.

    Attributes:
        timeout: seconds without a heartbeat after which a rank counts as hung; steps and evaluated batches give one.
        max_restarts: how many times ranks that died or hung are replaced; training goes on from the last checkpoint.
    """

    timeout: float = 600.0
    max_restarts: int = 0

    def launch(self, function: Callable[[Job, Path], None], job: Job) -> Request | None:
        """Run ``function(job, exchange)`` in ``job.plan.world_size`` processes.

        SIGINT, SIGTERM and SIGHUP let the ranks end their step and save; a second one, or ``STOP_PATIENCE``, ends them
        at once.

        Returns:
            Why training ended before its last step; None where it did not.

        Raises:
            WorkerError: where a rank raised, died or hung once too often, with the first failing rank's traceback.
            CifarExpError: the one that a rank raised for the user to mend.
            Stopped: on these signals, after all ranks have ended.
        """
        raise_swallowed()
        # Everything that ranks share before they know each other is a file in a folder of mode 0700: elastic's and
        # torch's TCP stores listen on all interfaces without authentication.
        with private_folder() as exchange:
            os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else the agent opens a TCP store after all
            _log_to_the_runs_file()
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=job.plan.world_size,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint=str(exchange / "rendezvous"),
                rdzv_configs={"store_type": "file"},
                max_restarts=self.max_restarts,
                local_addr="127.0.0.1",
                start_method=host.start_method(),
                logs_specs=DefaultLogsSpecs(log_dir=str(exchange / "logs")),
                # The others stay ours: elastic raises an Exception for them, which parts of it swallow, and would
                # end what runs under nohup.
                signals_to_handle="SIGQUIT",
            )
            watchdog, stopped = Watchdog(exchange, job.plan.world_size, self.timeout), list[Stopped]()
            try:
                with watchdog, forkserver.born_blocked(), _stopping_in_order(exchange, stopped):
                    elastic_launch(config, function)(job, exchange)
            except ChildFailedError as error:
                failure = _first_failure(error, exchange, watchdog, self.max_restarts)
                if not stopped:
                    raise failure from None
                if not isinstance(failure, WorkerError):  # which is what ranks that are ended leave behind
                    print(f"cifar-exp: {failure}", file=sys.stderr, flush=True)
                raise stopped[0] from None
            except SignalException as error:
                if stopped:
                    raise stopped[0] from None
                if watchdog.vanished:
                    raise _vanished(watchdog) from None
                raise Stopped(error.sigval) from None
            except Stopped as error:
                forkserver.end_forked()
                raise (stopped[0] if stopped else error) from None
            finally:
                _end_ranks()
            return ended_by(exchange)


@contextmanager
def _stopping_in_order(exchange: Path, received: list[Stopped]) -> Iterator[None]:
    """Pass the first signal to end on to the ranks and raise it when they have ended, or take too long.

    Ranks that take too long are killed, for elastic would wait half a minute for one that is stopped; so are all at
    the second signal.

    Args:
        exchange: the folder that ranks and launcher share.
        received: gets the first signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        received.append(Stopped(number))
        for signal_number in signals_to_answer():
            signal.signal(signal_number, end)
        answer_once(number)
        (exchange / LEAVE_FILE).touch()
        print("cifar-exp: the ranks end their step and save; once more ends them at once", file=sys.stderr, flush=True)
        signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, STOP_PATIENCE)

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        restore()
        forkserver.end_forked()
        raise received[0]

    before = {number: signal.signal(number, ask) for number in signals_to_answer()}

    def restore() -> None:
        for number in signals_to_answer():
            signal.signal(number, before[number])

    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        restore()
    if received:
        raise received[0]


def _log_to_the_runs_file() -> None:
    """What elastic logs of failing workers goes to the run's log: the user gets one message from us."""
    for name in ("torch.distributed", "torch.distributed.elastic", "torch.multiprocessing"):
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.handlers = list(logging.getLogger().handlers)


def _end_ranks() -> None:
    """A signal can arrive after ranks were forked and before elastic knows of them; it would leave them running."""
    ranks = multiprocessing.active_children()
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()


def _vanished(watchdog: Watchdog) -> WorkerError:
    told = watchdog.vanished[min(watchdog.vanished)]
    return WorkerError(f"{told}; the other ranks were ended. {AFTER_A_DEATH}")


def _first_failure(error: ChildFailedError, exchange: Path, watchdog: Watchdog, max_restarts: int) -> CifarExpError:
    """The cause: a rank that was killed leaves no word, so it counts before those that told why they failed."""
    records = RankFailure.of_attempt(exchange, max_restarts)
    told = {record.rank for record in records}
    for rank, failure in error.failures.items():
        if rank not in told:
            if rank in watchdog.hung:
                return WorkerError(f"{watchdog.hung[rank]}; the ranks were ended. {AFTER_A_DEATH}")
            how = f"exit code {failure.exitcode}"
            if failure.exitcode < 0:
                how = f"killed by {signal.Signals(-failure.exitcode).name}"
            return WorkerError(f"rank {rank} died without a word ({how}); the other ranks were ended. {AFTER_A_DEATH}")
    if watchdog.vanished.keys() - told:  # the others' failures are its echo
        return _vanished(watchdog)
    first = min(records, key=lambda record: record.time)
    try:
        first.raise_if_lasting()
    except CifarExpError as lasting:
        return lasting
    return WorkerError(f"rank {first.rank} failed; the other ranks were ended\n{first.traceback}".rstrip())
