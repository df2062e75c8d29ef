"""Real process groups for tests: one rank in this process, or several ranks in new processes."""

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
from cifar_exp.system import host
from tests.helpers.commands import ready_to_fork


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
    """Results of a picklable ``function`` from each of ``size`` single-threaded ranks.

    Forked ranks skip interpreter finalisation, which could abort a gloo thread inside a Python callback.
    """
    ready_to_fork()
    forkserver.start_fork_server()
    start_processes(_run_rank, (function, size, folder), nprocs=size, start_method=host.start_method())
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
