"""A process that has imported what ranks need and does nothing but fork them.

Importing torch costs a rank three seconds and its optimizers as many more (they import the compiler). The nursery,
which is Python's fork server, does both while the parent reads its configuration; ranks are forked from it in
milliseconds, as are those of a sweep's later jobs. It has one thread and no CUDA context, so forking it is safe.
"""

import multiprocessing.forkserver as forkserver
import signal
from contextlib import suppress
from multiprocessing import resource_tracker

import psutil

START_METHOD = "forkserver"


def warm_up() -> None:
    """Start the nursery, once a process; it ends with its parent."""
    forkserver.set_forkserver_preload(["cifar_exp.launch.forkserver_preload"])
    # Ctrl-C is the parent's to answer, also while the nursery's interpreter starts: it is born with the signal blocked.
    # So is the end of the terminal, for good: the nursery and Python's resource tracker, which is started here as well
    # and loses count when it is killed, end with their parent.
    blocked = {signal.SIGINT, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        resource_tracker.ensure_running()  # it unblocks SIGINT once it has started, so it comes first
        signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_forked() -> None:
    """Kill all that it has forked, also what this process was interrupted before it could learn of."""
    pid: int | None = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is None:
        return
    with suppress(psutil.NoSuchProcess):
        forked = psutil.Process(pid).children()
        for process in forked:
            process.kill()
        psutil.wait_procs(forked, timeout=5)
