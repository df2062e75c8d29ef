"""Start ranks by forking a process that has imported PyTorch (Python's fork server), or by spawning them.

Importing torch takes three seconds, and its optimizers as many more (they import the compiler). Python's fork server
does both while the parent reads the configuration. Ranks are forked from it in milliseconds, also for the later jobs of
a sweep. It has one thread and no CUDA context, so forking it is safe.

On macOS forking is not safe (see :func:`cifar_exp.system.host.start_method`). There each rank is spawned and imports
PyTorch itself.
"""

import multiprocessing.util
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import Any

import psutil

from cifar_exp.system import host

# Only the parent handles Ctrl-C. Its child processes start with SIGINT blocked, since an interpreter would otherwise
# react to it while it starts. SIGHUP stays blocked: ranks, fork server and resource tracker end with their parent.
BLOCKED = {signal.SIGINT, signal.SIGHUP}


def warm_up() -> None:
    """Start the fork server if this platform uses one and it does not run yet. It ends with its parent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    try:
        # A killed resource tracker would lose its counts. It starts first because starting it unblocks SIGINT.
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
    """Inside this context multiprocessing spawns processes with ``BLOCKED`` signals blocked, as the fork server does.

    A rank unblocks SIGINT itself.
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


@contextmanager
def without_main_module() -> Iterator[None]:
    """Processes that multiprocessing starts in the block do not import the program's main module.

    It may be a user's script without ``if __name__ == "__main__"``, which would train again in each rank. A job names
    nothing of that module.
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
def starting_ranks() -> Iterator[None]:
    """Start ranks in the block: with the parent's signals blocked, and without the program's main module."""
    with born_blocked(), without_main_module():
        yield


def end_forked() -> None:
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
