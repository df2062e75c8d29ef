"""The bytes that ranks send in an all-reduce, and the bandwidth of the links between them."""

import time
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from cifar_exp.distributed.collectives import sum_over_ranks
from cifar_exp.distributed.process_group import World


def sent_bytes(size: int, ranks: int) -> float:
    """Bytes that each rank sends in a ring all-reduce of ``size`` bytes: 2 (n - 1) / n (Patarasuk and Yuan 2009)."""
    return 2 * (ranks - 1) / ranks * size


def link_bytes_per_second(size: int, device: torch.device, group: Any = None) -> float:
    """All-reduce bandwidth per rank in bytes/s: the median of five all-reduces of ``size`` bytes.

    Args:
        size: bytes.
        device: of this rank.
        group: the process group of the ranks that take part; None: all ranks.
    """
    values, seconds = torch.zeros(max(1, size // 4), device=device), []
    for _ in range(6):
        dist.barrier(group)
        begin = time.perf_counter()
        sum_over_ranks(values, group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return sent_bytes(size, dist.get_world_size(group)) / median(seconds[1:])


def links_of_hosts(size: int, world: World) -> dict[str, float]:
    """What an all-reduce of ``size`` bytes costs inside a host and between hosts; empty for one host. A collective.

    In a ring over all ranks each rank sends to the next one, so each host sends as much to the next host as a rank
    sends. The bandwidth inside is measured among the ranks of each host, the one between among the first ranks of all.
    """
    if world.hosts == 1:
        return {}
    local = world.size // world.hosts
    inside = [list(range(first, first + local)) for first in range(0, world.size, local)]
    between = list(range(0, world.size, local))
    sent = sent_bytes(size, world.size)
    found = {"hosts": float(world.hosts), "between_hosts/bytes_per_step": sent}
    for name, members in {"inside_a_host": inside, "between_hosts": [between]}.items():
        groups = [(ranks, dist.new_group(ranks)) for ranks in members if len(ranks) > 1]
        for ranks, group in groups:
            if world.rank in ranks:
                rate = link_bytes_per_second(size, world.device, group)
                found |= {f"{name}/bytes_per_second": rate, f"{name}/seconds_per_step": sent / rate}
        dist.barrier()
    return found
