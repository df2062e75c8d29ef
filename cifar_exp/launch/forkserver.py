"""Python's fork server, from which ranks are forked with PyTorch already imported.

Importing torch takes three seconds, and its optimizers another three (they import the compiler). The fork server
imports both while the parent builds the components and reads the images. Forking a rank from it takes milliseconds,
also in later jobs of a sweep. The fork server has one thread and no CUDA context, so forking it is safe.

On macOS forking is not safe (see :func:`cifar_exp.system.host.start_method`). There each rank is spawned and imports
PyTorch itself.
"""

import multiprocessing
import tempfile
from multiprocessing import resource_tracker
from pathlib import Path

from cifar_exp.errors import MachineError, storage_errors
from cifar_exp.system import host
from cifar_exp.system.import_path import SafeHelpers
from cifar_exp.system.signals import blocked_signals
from cifar_exp.system.surroundings import make_socket_folder


def start_fork_server() -> None:
    """Start the fork server if this platform uses one and it is not running yet. It ends with its parent.

    Raises:
        MachineError: ranks and their parent cannot share locks here.
        StorageError: the temporary folder cannot be written.
    """
    if problem := host.shared_lock_problem():
        raise MachineError(
            f"{host.SHARED_MEMORY}: ranks and their parent share locks, and none can be made there: {problem}. Free "
            f"space there or allow writing; for a container, set --shm-size=1g or --ipc=host"
        )
    with storage_errors(Path(tempfile.gettempdir()), "Set TMPDIR=<a folder that you may write to>"):
        make_socket_folder()
    # Ranks, fork server and resource tracker leave signals to the parent. The resource tracker's start unblocks SIGINT
    # and SIGTERM here, so it is started first, in a separate block. The tracker itself ignores these two.
    with blocked_signals(), SafeHelpers():
        resource_tracker.ensure_running()
    _set_known_start_method()
    if host.start_method() == "forkserver":
        import multiprocessing.forkserver as forkserver

        forkserver.set_forkserver_preload(["cifar_exp.launch.forkserver_preload"])
        with blocked_signals(), SafeHelpers():
            forkserver.ensure_running()


def _set_known_start_method() -> None:
    """Replace a default start method that a library added, such as joblib's ``loky``, which ranks do not have."""
    if multiprocessing.get_start_method(allow_none=True) not in (None, *host.START_METHODS):
        multiprocessing.set_start_method(host.start_method(), force=True)
