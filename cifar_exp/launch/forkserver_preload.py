"""The module that the fork server imports before it forks ranks.

The fork server only imports it, so the set-up is at module level.
"""

import gc
import pickle
import sys
from contextlib import suppress
from types import TracebackType

from cifar_exp.system.host import end_with_parent
from cifar_exp.system.signals import leave_signals_to_parent

leave_signals_to_parent()  # before the imports, which take seconds
end_with_parent()


def _show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Hide the traceback of a rank whose parent was stopped while it sent the job.

    The pickled job is then incomplete, or its semaphores no longer exist.
    """
    is_half = isinstance(error, EOFError | pickle.UnpicklingError)
    if not is_half and not (isinstance(error, FileNotFoundError) and _raised_in(traceback) == "SemLock.__setstate__"):
        sys.__excepthook__(kind, error, traceback)


def _raised_in(traceback: TracebackType | None) -> str:
    """The qualified name of the function that raised."""
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_code.co_qualname if traceback else ""


sys.excepthook = _show

# Garbage collection would take a quarter of the import time and find nothing. Ranks enable it again.
gc.disable()

import torch._dynamo  # noqa: E402, F401

with suppress(Exception):  # each rank reports why it cannot fuse its layers
    from cifar_exp.cpu_kernels.fuse import preload

    preload()
