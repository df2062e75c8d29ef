"""Run a function on N ranks with torch elastic; handle failures and signals; leave no process behind."""

import logging
import multiprocessing
import os
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cifar_exp.distributed.stop_requests import Request, ended_by, interrupted_by
from cifar_exp.errors import HostStoppedError, Stopped, WorkerError, storage_errors
from cifar_exp.launch import rank_processes
from cifar_exp.launch.failures import as_errors
from cifar_exp.launch.host_link import HostLink
from cifar_exp.launch.host_settings import HostSettings, host_settings
from cifar_exp.launch.host_zero import HostsMissingError, host_zero
from cifar_exp.launch.stopping import GracefulStop
from cifar_exp.launch.watchdog import Watchdog
from cifar_exp.system import host
from cifar_exp.system.printable import print_notice
from cifar_exp.system.signals import raise_swallowed
from cifar_exp.system.temp_folder import private_folder
from cifar_exp.worker.job import Job
from cifar_exp.worker.restart import restarted


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
        hosts: number of hosts, or ``1:2`` for at least 1 and at most 2; each runs the same command.
        host_rank: the number of this host, from 0.
        rendezvous: ``host:port`` of host 0; None for a run on one host.
        token_file: a file of mode 0600 with the secret that all hosts know; None: the variable CIFAR_EXP_TOKEN.
        max_restarts: how many times all ranks are restarted after one died or hung. Training then resumes from the last
            checkpoint.
    """

    timeout: float
    max_restarts: int
    hosts: int | str
    host_rank: int
    rendezvous: str | None
    token_file: str | None

    def host_settings(self, are_hosts_known: bool = True) -> HostSettings:
        """The settings of a run over several hosts.

        Args:
            are_hosts_known: whether ``hosts`` is the number of hosts; else it is an axis of the sweep.

        Raises:
            ConfigError: they do not fit together, or there is no token.
        """
        given = self.hosts, self.host_rank, self.rendezvous, self.token_file, self.timeout
        return host_settings(*given, are_hosts_known)

    def launch(self, function: Callable[[Job, Path], None], job: Job) -> Request | None:
        """Run ``function(job, ipc_dir)`` in ``job.plan.world_size`` processes.

        On SIGINT, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2 the ranks finish their step and save. They are killed at
        a second signal or after ``GRACE_SECONDS`` seconds.

        Args:
            function: called in each rank with the job and the folder that ranks and launcher share.
            job: the description of the work; it is pickled.

        Returns:
            The reason if training ended before its last step; else None.

        Raises:
            WorkerError: a rank raised, died or hung, and no restart is left. The message has the traceback of the rank
                that failed first.
            CifarExpError: a rank raised an error that the user can fix.
            StorageError: the temporary folder cannot be written, or was removed while the ranks trained.
            Stopped: one of these signals arrived; all ranks have ended.
        """
        raise_swallowed()
        if self.hosts != 1:
            return self._launch_on_hosts(function, job)
        with _shared_folder() as ipc_dir:
            self._run_ranks(function, job, ipc_dir, self.max_restarts)
            return ended_by(ipc_dir)

    def admit_hosts(self, job: Job) -> None:
        """Wait for the other hosts of the run, if it has several, before it is recorded.

        Raises:
            CifarExpError: see :meth:`HostZero.admit`.
        """
        if self.hosts != 1:
            settings = self.host_settings()
            host_zero(settings).admit(settings, job)

    def _launch_on_hosts(self, function: Callable[[Job, Path], None], job: Job) -> Request | None:
        """Run the ranks of all hosts, again after a failure if restarts are left. Raises as :meth:`launch`."""
        settings = self.host_settings()
        hosts = host_zero(settings)
        for attempt in range(self.max_restarts + 1):
            is_last = attempt == self.max_restarts
            try:
                if attempt:
                    hosts.admit(settings, job)
                with _shared_folder() as ipc_dir, hosts.round(settings, job, is_last) as (placed, admitted):
                    link = HostLink(admitted.place, 0, admitted.store, ipc_dir, admitted.members, hosts.presence)
                    self.run_ranks_of_host(function, placed, link)
                    ended = ended_by(ipc_dir)
                    if ended and ended.kind == "interrupt":  # another host got the signal
                        raise Stopped(interrupted_by(ipc_dir))
                    return ended
            except HostStoppedError as stopped:
                print_notice(stopped)
                raise Stopped(stopped.exit_code - 128) from None
            except HostsMissingError as missing:
                if not attempt:
                    raise
                raise WorkerError(f"a host was lost and has not come back. {missing}") from None
            except WorkerError as error:
                if is_last:
                    raise
                print_notice(error)
                job = restarted(job, attempt + 1, print_notice)
        raise AssertionError

    def run_ranks_of_host(self, function: Callable[[Job, Path], None], job: Job, link: HostLink) -> None:
        """Run the ranks of one host among several. Raises as :meth:`launch`."""
        with link:
            self._run_ranks(function, job, link.ipc_dir, 0, link)
            link.succeeded()

    def _run_ranks(
        self,
        function: Callable[[Job, Path], None],
        job: Job,
        ipc_dir: Path,
        restarts: int,
        link: HostLink | None = None,
    ) -> None:
        """Run this host's ranks until all have ended."""
        size = job.place.local_size if job.place else job.plan.world_size
        first = job.place.first_rank if job.place else 0
        watchdog = Watchdog(ipc_dir, size, self.timeout, first, decides=link is None)
        if link:
            link.watchdog = watchdog
        stopping = GracefulStop(ipc_dir)
        try:
            with (
                as_errors(ipc_dir, watchdog, stopping, restarts, link),
                watchdog,
                rank_processes.starting_ranks(),
                stopping,
            ):
                elastic_launch(self._config(size, ipc_dir, restarts), function)(job, ipc_dir)
        finally:
            _end_ranks()

    def _config(self, world_size: int, ipc_dir: Path, restarts: int) -> LaunchConfig:
        """How torch elastic starts ``world_size`` ranks that meet in the folder ``ipc_dir``.

        Ranks find each other through files in this folder of mode 0700. The TCP stores of elastic and torch would
        listen on all interfaces without authentication.
        """
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # else the agent opens a TCP store
        _log_to_the_runs_file()
        _name_callers_cheaply()
        return LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=world_size,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=str(ipc_dir / "rendezvous"),
            rdzv_configs={"store_type": "file"},
            max_restarts=restarts,
            local_addr="127.0.0.1",
            start_method=host.start_method(),
            logs_specs=DefaultLogsSpecs(log_dir=str(ipc_dir / "logs")),
            # This launcher handles the signals that stop a run. Elastic's handlers raise an exception, and parts of
            # elastic catch it. They also end a run under nohup.
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


def _log_to_the_runs_file() -> None:
    """Write elastic's log of failed workers only to the run's log. The user gets one message from this launcher."""
    for name in ("torch.distributed", "torch.distributed.elastic", "torch.multiprocessing"):
        logger = logging.getLogger(name)
        logger.propagate = False
        logger.handlers = list(logging.getLogger().handlers) or [logging.NullHandler()]  # other hosts have no log


def _name_callers_cheaply() -> None:
    """Name the caller of each rendezvous event by its frame. torch reads the source of every frame, 18 times."""
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
