"""Real process groups for tests: one rank in this process, or several in processes of their own."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

from cifar_exp.distributed.process_group import World, joined_world
from cifar_exp.launch import forkserver


@contextmanager
def world_of_one(folder: Path) -> Iterator[World]:
    """In this process."""
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "eth-of-a-cluster"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with joined_world("cpu", folder, timeout=60) as world:
            yield world


def results_of_ranks(function: Callable[[World], Any], size: int, folder: Path) -> list[Any]:
    """What ``function``, of a module's top level, returns on each of ``size`` ranks of one thread.

    They are forked as a run's are, which end without Python's finalisation: that would abort a thread of gloo's which
    is still at a callback of Python's.
    """
    forkserver.warm_up()
    start_processes(_run_rank, (function, size, folder), nprocs=size, start_method=forkserver.START_METHOD)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(size)]


def _run_rank(rank: int, function: Callable[[World], Any], size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "GLOO_SOCKET_IFNAME": "eth-of-a-cluster",
    }
    with joined_world("cpu", folder, timeout=60) as world:
        results = function(world)
    torch.save(results, folder / f"rank-{rank}.pt")
