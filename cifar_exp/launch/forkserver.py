"""Python's fork server, from which ranks are forked with PyTorch already imported.

Importing torch takes three seconds, and its optimizers as many more (they import the compiler). The fork server imports
both while the parent builds the components and reads the images. Ranks are forked from it in milliseconds, also for the
later jobs of a sweep. It has one thread and no CUDA context, so forking it is safe.

On macOS forking is not safe (see :func:`cifar_exp.system.host.start_method`). There each rank is spawned and imports
PyTorch itself.
"""

import multiprocessing.util
import shutil
import signal
import tempfile
from multiprocessing import resource_tracker
from pathlib import Path

from cifar_exp.errors import MachineError, storage_errors
from cifar_exp.system import host
from cifar_exp.system.import_path import SafeHelpers

# Only the parent handles Ctrl-C. Its child processes start with SIGINT blocked, since an interpreter would otherwise
# react to it while it starts. SIGHUP stays blocked: ranks, fork server and resource tracker end with their parent.
BLOCKED = {signal.SIGINT, signal.SIGHUP}


def start_fork_server() -> None:
    """Start the fork server if this platform uses one and it does not run yet. It ends with its parent.

    Raises:
        MachineError: ranks and their parent could not share locks.
        StorageError: the temporary folder cannot be written.
    """
    if problem := host.shared_lock_problem():
        raise MachineError(
            f"{host.SHARED_MEMORY}: ranks and their parent share locks, and none can be made there: {problem}. Free "
            f"space there or allow writing; for a container, set --shm-size=1g or --ipc=host"
        )
    _make_socket_folder()
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


def _make_socket_folder() -> None:
    """Make the folder of multiprocessing's sockets, which is removed when this process ends.

    Python would make it, too, but show a traceback at the end if something else has removed it.
    """
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    if "tempdir" not in config:
        with storage_errors(Path(tempfile.gettempdir()), "Set TMPDIR=<a folder that you may write to>"):
            config["tempdir"] = tempfile.mkdtemp(prefix="pymp-")
        multiprocessing.util.Finalize(None, shutil.rmtree, args=(config["tempdir"], True), exitpriority=-100)


def _set_known_start_method() -> None:
    """Replace a default start method that a library added, such as joblib's ``loky``: ranks would not know it."""
    if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
        multiprocessing.set_start_method(host.start_method(), force=True)
