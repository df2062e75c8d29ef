"""Arms in separate processes: libraries cannot disturb each other, and ranks are real ranks."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


class ProcessArm:
    """An arm in one or more processes that stay alive between turns: start-up and imports are not measured.

    Used as a context manager, which ends the processes.

    Args:
        function: called in each process as ``function(turns, folder, *args)``. It prepares itself, then works once for
            each item of ``turns``. Several ranks have ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE`` set and share
            ``folder`` for their rendezvous. It must be picklable.
        args: arguments of the function; they must be picklable.
        ranks: number of processes.
        threads: CPU threads of torch in each process.
        independent: whether the processes are separate (each is rank 0 of 1). A turn's seconds are then those of the
            same work at the sum of their throughputs; else they are those of the slowest rank.
    """

    def __init__(
        self, function: Callable[..., None], *args: Any, ranks: int = 1, threads: int, independent: bool = False
    ) -> None:
        self._independent = independent
        self._folders = [tempfile.TemporaryDirectory() for _ in range(ranks if independent else 1)]
        self._pipes: list[Connection] = []
        self._processes = []
        context = multiprocessing.get_context("spawn")
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            seat = (0, 1) if independent else (rank, ranks)
            folder = self._folders[rank if independent else 0].name
            process = context.Process(target=_serve, args=(theirs, function, seat, threads, folder, args))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    @property
    def folders(self) -> list[Path]:
        """The folders of the processes: one for all ranks, or one each if they are independent."""
        return [Path(folder.name) for folder in self._folders]

    def __call__(self) -> float:
        """Run one turn in all processes. Returns its seconds."""
        try:
            for pipe in self._pipes:
                pipe.send("go")
            seconds = [pipe.recv() for pipe in self._pipes]
        except (EOFError, BrokenPipeError):
            raise RuntimeError("a process of this arm has ended; its traceback is above") from None
        return len(seconds) / sum(1 / value for value in seconds) if self._independent else max(seconds)

    def __enter__(self) -> "ProcessArm":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        for folder in self._folders:
            folder.cleanup()


def turns_of(pipe: Connection) -> Iterator[None]:
    """One item per turn. Taking the next item ends the turn, sends its seconds, and waits for the next turn.

    Raises:
        SystemExit: there are no more turns.
    """
    try:
        while True:
            pipe.recv()
            began = time.perf_counter()
            yield
            pipe.send(time.perf_counter() - began)
    except (EOFError, BrokenPipeError):
        raise SystemExit(0) from None


def _serve(
    pipe: Connection,
    function: Callable[..., None],
    seat: tuple[int, int],
    threads: int,
    folder: str,
    args: tuple[Any, ...],
) -> None:
    rank, size = seat
    if size > 1:  # else other libraries would assume a distributed run
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    torch.set_num_threads(threads)
    try:
        function(turns_of(pipe), folder, *args)
    except Exception:
        traceback.print_exc()
        raise
    finally:
        pipe.close()
