"""Find out why the ranks failed, and raise the error for the user."""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from cifar_exp.errors import CifarExpError, Stopped, StorageError, WorkerError
from cifar_exp.launch import rank_processes
from cifar_exp.launch.host_link import HostLink
from cifar_exp.launch.stopping import GracefulStop
from cifar_exp.launch.watchdog import Watchdog
from cifar_exp.system import host
from cifar_exp.system.printable import print_notice
from cifar_exp.worker.failure import RankFailure

AFTER_A_DEATH = (
    "Set resume=auto to continue from the last checkpoint, or launcher.max_restarts=3 to restart automatically in "
    "later runs"
)
DEATHS = {
    signal.SIGBUS: f": {host.SHARED_MEMORY} or a disk is full, or a file that is mapped into memory was cut",
    signal.SIGXFSZ: ": ulimit -f does not allow files of this size",
}


@contextmanager
def as_errors(
    ipc_dir: Path, watchdog: Watchdog, stopping: GracefulStop, max_restarts: int, link: HostLink | None = None
) -> Iterator[None]:
    """Convert an exception of torch elastic inside this context to an error of this package.

    Args:
        ipc_dir: the folder that ranks and launcher share.
        watchdog: the watchdog of the ranks.
        stopping: handles the stop signals.
        max_restarts: the number of restarts.
        link: the link to the other hosts; None for a run on one host.

    Raises:
        CifarExpError: see ``ElasticLauncher.launch``.
    """
    try:
        yield
    except OSError:
        if is_removed(ipc_dir):
            raise _removed(ipc_dir) from None
        raise
    except ChildFailedError as error:
        failure = first_failure(error, ipc_dir, watchdog, max_restarts)
        if not stopping.received:
            raise (link.failed(failure) if link else failure) from None
        if not isinstance(failure, WorkerError):  # a WorkerError is the effect of the signal
            print_notice(failure)
        raise stopping.received from None
    except SignalException as error:
        if stopping.received:
            raise stopping.received from None
        if is_removed(ipc_dir):
            raise _removed(ipc_dir) from None
        if link and link.error:
            raise link.error from None
        if watchdog.vanished:
            failure = _silent_exit(watchdog)
            raise (link.failed(failure) if link else failure) from None
        raise Stopped(error.sigval) from None
    except Stopped as error:
        rank_processes.kill_ranks()
        raise (stopping.received or error) from None


def _silent_exit(watchdog: Watchdog) -> WorkerError:
    message = watchdog.vanished[min(watchdog.vanished)]
    return WorkerError(f"{message}; the other ranks were ended. {AFTER_A_DEATH}")


def first_failure(error: ChildFailedError, ipc_dir: Path, watchdog: Watchdog, max_restarts: int) -> CifarExpError:
    """Find the cause of a failed run.

    A killed rank leaves no failure file, and the other ranks fail because of it. So a rank without a file is the cause.
    If every rank has a file, the cause is the rank that failed first.
    """
    if is_removed(ipc_dir):
        return _removed(ipc_dir)
    records = RankFailure.of_attempt(ipc_dir, max_restarts)
    recorded = {record.rank for record in records}
    for local_rank, failure in error.failures.items():
        rank = watchdog.first_rank + local_rank
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
        return _silent_exit(watchdog)
    first = min(records, key=lambda record: record.time)
    try:
        first.raise_if_lasting()
    except CifarExpError as lasting:
        return lasting
    return WorkerError(f"rank {first.rank} failed; the other ranks were ended\n{first.traceback}".rstrip())


def is_removed(ipc_dir: Path) -> bool:
    """Whether the ranks' folder or the folder of the fork server's socket was removed."""
    sockets = multiprocessing.current_process()._config.get("tempdir")  # type: ignore[attr-defined]
    return not ipc_dir.exists() or (sockets is not None and not Path(sockets).exists())


def _removed(ipc_dir: Path) -> StorageError:
    return StorageError(
        f"TMPDIR={ipc_dir.parent}: folders in it that the run needs were removed while it ran. Set TMPDIR to a folder "
        f"that nothing cleans up, and resume=auto to continue from the last checkpoint"
    )
