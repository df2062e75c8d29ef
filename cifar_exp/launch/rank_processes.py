"""Start and end the processes of ranks: forked from the fork server, or spawned where forking is not safe."""

import multiprocessing.process
import multiprocessing.util
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing.api import PContext

from cifar_exp.system import host
from cifar_exp.system.import_path import SafeHelpers
from cifar_exp.system.signals import blocked_signals


@contextmanager
def spawning_with_signals_blocked() -> Iterator[None]:
    """Inside this context multiprocessing spawns processes with signals blocked, as for the fork server."""
    util: Any = multiprocessing.util
    spawn = util.spawnv_passfds

    def spawned(*arguments: Any) -> Any:
        with blocked_signals(), SafeHelpers():
            return spawn(*arguments)

    util.spawnv_passfds = spawned
    try:
        yield
    finally:
        util.spawnv_passfds = spawn


@contextmanager
def without_main_module() -> Iterator[None]:
    """Inside this context multiprocessing starts processes that do not import the program's main module.

    That module may be a user's script without ``if __name__ == "__main__"``, which would train again in
    each rank. The pickled ``Job`` does not refer to it.
    """
    main = sys.modules["__main__"]
    hidden = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)


@contextmanager
def ending_ranks_by_sigkill() -> Iterator[None]:
    """Inside this context torch ends ranks by SIGKILL, as after the death of another one.

    By default it sends SIGTERM, which ranks leave to their parent, and half a minute later SIGKILL. It does so in
    ``torch.multiprocessing``, by ``terminate``, and then in elastic.
    """
    context: Any = PContext
    process: Any = multiprocessing.process.BaseProcess
    close, terminate = context.close, process.terminate

    def killed(self: Any, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:  # noqa: ARG001
        close(self, signal.SIGKILL, timeout)

    context.close, process.terminate = killed, process.kill
    try:
        yield
    finally:
        context.close, process.terminate = close, terminate


@contextmanager
def starting_ranks() -> Iterator[None]:
    """Start ranks in the block, and end them: they leave signals to this process, and know no main module."""
    with spawning_with_signals_blocked(), without_main_module(), ending_ranks_by_sigkill():
        yield


def kill_ranks() -> None:
    """Kill all ranks, including those that elastic has not registered yet."""
    with suppress(psutil.NoSuchProcess):
        ranks = _ranks()
        for process in ranks:
            process.kill()
        psutil.wait_procs(ranks, timeout=5)


def _ranks() -> list[psutil.Process]:
    if host.start_method() == "spawn":
        children = psutil.Process().children()
        return [child for child in children if "multiprocessing.spawn" in " ".join(_command_line(child))]
    import multiprocessing.forkserver as forkserver

    pid: int | None = getattr(forkserver._forkserver, "_forkserver_pid", None)
    return psutil.Process(pid).children() if pid is not None else []


def _command_line(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []
