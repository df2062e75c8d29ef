"""How ranks come to be: forked from a process that has imported what they need, or each as a process of its own.

Importing torch takes three seconds, and its optimizers as many more (they import the compiler). Python's fork server
does both while the parent reads the configuration. Ranks are forked from it in milliseconds, also for the later jobs of
a sweep. It has one thread and no CUDA context, so forking it is safe.

On macOS it is not: :func:`cifar_exp.system.host.start_method`. There each rank is spawned and imports for itself.
"""

import multiprocessing.util
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import Any

import psutil

from cifar_exp.system import host

# Ctrl-C is the parent's to answer, also while an interpreter starts: what the parent starts is born with the signal
# blocked. So is the end of the terminal, for good: ranks, nursery and Python's resource tracker end with their parent.
BLOCKED = {signal.SIGINT, signal.SIGHUP}


def warm_up() -> None:
    """Start the nursery, once a process, where ranks come from one; it ends with its parent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    try:
        # It loses count when it is killed. It unblocks SIGINT once it has started, so it comes first.
        resource_tracker.ensure_running()
        if host.start_method() == "forkserver":
            import multiprocessing.forkserver as forkserver

            forkserver.set_forkserver_preload(["cifar_exp.launch.forkserver_preload"])
            signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def born_blocked() -> Iterator[None]:
    """Processes that multiprocessing spawns in the block start with these signals blocked, as the fork server does.

    A rank unblocks Ctrl-C itself.
    """
    util: Any = multiprocessing.util
    spawn = util.spawnv_passfds

    def spawned(*arguments: Any) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
        try:
            return spawn(*arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    util.spawnv_passfds = spawned
    try:
        yield
    finally:
        util.spawnv_passfds = spawn


def end_forked() -> None:
    """Kill all ranks, also those that this process was interrupted before it could learn of."""
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
