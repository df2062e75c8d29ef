"""What the nursery imports, the only thing that Python's fork server can be told: hence a side effect."""

import gc
import pickle
import signal
import sys
from contextlib import suppress
from types import TracebackType

from cifar_exp.system.host import end_with_parent

# Before the imports, which take seconds: Ctrl-C is the parent's to answer.
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
end_with_parent()


def _show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """A parent that is stopped while it hands a rank its job leaves half of it: nothing to tell the user.

    Or all of it, without the semaphores that it names.
    """
    is_half = isinstance(error, EOFError | pickle.UnpicklingError)
    if not is_half and not (isinstance(error, FileNotFoundError) and _raised_in(traceback) == "SemLock.__setstate__"):
        sys.__excepthook__(kind, error, traceback)


def _raised_in(traceback: TracebackType | None) -> str:
    """The function that raised."""
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_code.co_qualname if traceback else ""


sys.excepthook = _show

# Looking for garbage among what is being imported takes a quarter of the time, and finds none. Ranks look again.
gc.disable()

import torch._dynamo  # noqa: E402, F401

with suppress(Exception):  # each rank says why it cannot fuse its layers
    from cifar_exp.cpu_kernels.fuse import preload

    preload()
