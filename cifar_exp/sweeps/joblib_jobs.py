"""End the parallel jobs of a sweep with Hydra's joblib launcher, after they have saved. Each is a worker process."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from cifar_exp.errors import Stopped
from cifar_exp.records.run_folder import LOCK_FILE
from cifar_exp.system.locks import is_free
from cifar_exp.system.signals import is_repeated, note_stopped, signals_to_answer

SAVING_SECONDS = 8.0  # ranks get 7 of them


@contextmanager
def saving_jobs(sweep_dir: Path, processes: Callable[[], list[int]] | None = None) -> Iterator[None]:
    """Pass a signal in the block on to the jobs, and wait until they have saved and closed their runs.

    Joblib would kill them at once. They have ended when the locks of their folders are free.

    Args:
        sweep_dir: the folder of the sweep.
        processes: returns the processes of the jobs; None: those of Hydra's joblib launcher.

    Raises:
        Stopped: for the signal, after the wait; for a second signal at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[Stopped] = []

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if received:
            if is_repeated(received[0], number):
                return
            raise received[0]
        received.append(Stopped(number))
        workers = (processes or _workers)()  # none of other launchers: their jobs live on, or got the signal themselves
        locks = [path for path in sweep_dir.rglob(LOCK_FILE) if path.parent != sweep_dir and not is_free(path)]
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, number)
        deadline = time.monotonic() + SAVING_SECONDS
        while workers and time.monotonic() < deadline and not all(map(is_free, locks)):
            time.sleep(0.05)
        raise received[0]

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in signals_to_answer()}
    try:
        yield
    finally:
        for number in signals_to_answer():
            signal.signal(number, before[number])
        if received:
            note_stopped(received[0])


def end_idle_workers() -> None:
    """End joblib's worker processes. They would wait five minutes for work, and this process for them."""
    if (executor := _executor()) is not None:
        executor.shutdown(wait=True, kill_workers=True)


def _workers() -> list[int]:
    return list(getattr(_executor(), "_processes", None) or ())


def _executor() -> Any:
    loky = sys.modules.get("joblib.externals.loky.reusable_executor")
    return getattr(loky, "_executor", None)
