"""Python's fork server, from which ranks are forked with PyTorch already imported.

Importing torch takes three seconds, and its optimizers as many more (they import the compiler). The fork server imports
both while the parent builds the components and reads the images. Ranks are forked from it in milliseconds, also for the
later jobs of a sweep. It has one thread and no CUDA context, so forking it is safe.

On macOS forking is not safe (see :func:`cifar_exp.system.host.start_method`). There each rank is spawned and imports
PyTorch itself.
"""

import multiprocessing
import signal
from multiprocessing import resource_tracker

from cifar_exp.system import host
from cifar_exp.system.import_path import SafeHelpers

# Only the parent handles Ctrl-C. Its child processes start with SIGINT blocked, since an interpreter would otherwise
# react to it while it starts. SIGHUP stays blocked: ranks, fork server and resource tracker end with their parent.
BLOCKED = {signal.SIGINT, signal.SIGHUP}


def start_fork_server() -> None:
    """Start the fork server if this platform uses one and it does not run yet. It ends with its parent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    try:
        # Start the resource tracker here, with the signals blocked, so that Ctrl-C does not kill it. Its start
        # unblocks SIGINT, so they are blocked again below.
        with SafeHelpers():
            resource_tracker.ensure_running()
        _set_known_start_method()
        if host.start_method() == "forkserver":
            import multiprocessing.forkserver as forkserver

            forkserver.set_forkserver_preload(["cifar_exp.launch.forkserver_preload"])
            signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
            with SafeHelpers():
                forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _set_known_start_method() -> None:
    """Replace a default start method that a library added, such as joblib's ``loky``: ranks would not know it."""
    if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
        multiprocessing.set_start_method(host.start_method(), force=True)
