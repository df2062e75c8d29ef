"""Devices -> N ranks of one function on torch elastic; failures, signals, nothing left behind."""

import json
import logging
import multiprocessing
import os
import signal
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cifar_exp import nursery
from cifar_exp.errors import (
    CifarExpError,
    ConfigError,
    DataError,
    DivergenceError,
    MachineError,
    Stopped,
    StorageError,
    WorkerError,
)
from cifar_exp.schema import Devices
from cifar_exp.temporary import private_folder
from cifar_exp.worker import Job, RankFailure


@dataclass(frozen=True)
class DeviceSet:
    """The devices that a run uses.

    Attributes:
        accelerator: ``cpu`` or ``gpu``.
        count: number of ranks.
        threads: CPU threads a rank.
        found: GPUs or cores that this process may use.
        oversubscribed: whether ranks share a GPU or a core.
    """

    accelerator: str
    count: int
    threads: int
    found: int
    oversubscribed: bool

    def __str__(self) -> str:
        unit = "GPU" if self.accelerator == "gpu" else "core"
        used = f"{self.count} rank{'s'[: self.count > 1]} x {self.threads} thread{'s'[: self.threads > 1]}"
        if self.accelerator == "gpu":
            used = f"{self.count} GPU{'s'[: self.count > 1]}"
        shared = ", oversubscribed" if self.oversubscribed else ""
        return f"{used} (found {self.found} {unit}{'s'[: self.found > 1]}{shared})"


def find_devices(wanted: Devices) -> DeviceSet:
    """Turn ``auto`` and counts into devices. CUDA is asked for a count and not initialised.

    Raises:
        MachineError: where more is asked for than there is.
    """
    cores = len(os.sched_getaffinity(0))
    gpus = torch.cuda.device_count()
    accelerator = wanted.accelerator
    if accelerator == "auto":
        accelerator = "gpu" if gpus else "cpu"
    if accelerator == "gpu":
        if gpus == 0:
            raise MachineError("devices.accelerator=gpu: requested GPUs, found 0. Type devices=cpu")
        count = gpus if wanted.count == "auto" else wanted.count
        threads = max(1, cores // count) if wanted.threads == "auto" else wanted.threads
        if count > gpus:
            raise MachineError(
                f"devices.count={count}: requested {count} GPUs, found {gpus}. NCCL takes one rank a GPU. Type "
                f"devices.count={gpus}, or devices=cpu"
            )
        return DeviceSet("gpu", count, threads, gpus, oversubscribed=False)
    count = 1 if wanted.count == "auto" else wanted.count
    threads = (cores if wanted.count == "auto" else 1) if wanted.threads == "auto" else wanted.threads
    needed = count * threads
    if needed > cores and not wanted.oversubscribe:
        fits = f"devices.count={cores}" if wanted.threads == "auto" else f"devices.threads={max(1, cores // count)}"
        raise MachineError(
            f"devices.count={wanted.count} devices.threads={wanted.threads}: requested {needed} cores, found {cores}. "
            f"Type {fits}, or devices.oversubscribe=true to share them"
        )
    return DeviceSet("cpu", count, threads, cores, oversubscribed=needed > cores)


class Launcher(Protocol):
    """What `_target_` of ``conf/launcher`` is."""

    timeout: float

    def launch(self, function: Callable[[Job, Path], None], job: Job) -> None:
        """Run ``function`` on every rank and return when all have ended well."""
        ...


@dataclass(frozen=True)
class ElasticLauncher:
    """Ranks as processes of this machine, on torch elastic.

    Attributes:
        timeout: seconds a collective operation may wait for the slowest rank.
    """

    timeout: float = 600.0

    def launch(self, function: Callable[[Job, Path], None], job: Job) -> None:
        """Run ``function(job, exchange)`` in ``job.plan.world_size`` processes.

        Raises:
            WorkerError: where a rank raised or died, with the first failing rank's traceback.
            CifarExpError: the one that a rank raised for the user to mend.
            Stopped: on SIGINT and SIGTERM, after all ranks have ended.
        """
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
                max_restarts=0,
                local_addr="127.0.0.1",
                start_method=nursery.START_METHOD,
                logs_specs=DefaultLogsSpecs(log_dir=str(exchange / "logs")),
                # Ctrl-C and SIGTERM stay ours: elastic raises an Exception for them, which parts of it swallow.
                signals_to_handle="SIGHUP,SIGQUIT",
            )
            try:
                elastic_launch(config, function)(job, exchange)
            except ChildFailedError as error:
                raise _first_failure(error, exchange) from None
            except SignalException as error:
                raise Stopped(error.sigval) from None
            finally:
                _end_ranks()


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


def _first_failure(error: ChildFailedError, exchange: Path) -> CifarExpError:
    """The cause: a rank that was killed leaves no word, so it counts before those that told why they failed."""
    records = [RankFailure(**json.loads(path.read_text())) for path in exchange.glob("failure-*.json")]
    told = {record.rank for record in records}
    for rank, failure in error.failures.items():
        if rank not in told:
            how = f"exit code {failure.exitcode}"
            if failure.exitcode < 0:
                how = f"killed by {signal.Signals(-failure.exitcode).name}"
            return WorkerError(f"rank {rank} died without a word ({how}); the other ranks were ended")
    first = min(records, key=lambda record: record.time)
    for kind in (ConfigError, DataError, MachineError, DivergenceError, StorageError):
        if first.exit_code == kind.exit_code:
            return kind(first.message.partition(": ")[2])
    return WorkerError(f"rank {first.rank} failed; the other ranks were ended\n{first.traceback}".rstrip())
