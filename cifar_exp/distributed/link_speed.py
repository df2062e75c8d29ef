"""The bytes that ranks send in an all-reduce, and the bandwidth of the link between them."""

import time
from statistics import median

import torch
import torch.distributed as dist

from cifar_exp.distributed.collectives import sum_over_ranks


def sent_bytes(size: int, ranks: int) -> float:
    """Bytes that each rank sends in a ring all-reduce of ``size`` bytes: 2 (n - 1) / n (Patarasuk and Yuan 2009)."""
    return 2 * (ranks - 1) / ranks * size


def link_bytes_per_second(size: int, device: torch.device) -> float:
    """All-reduce bandwidth per rank in bytes/s: the median of five all-reduces of ``size`` bytes."""
    values, seconds = torch.zeros(max(1, size // 4), device=device), []
    for _ in range(6):
        dist.barrier()
        begin = time.perf_counter()
        sum_over_ranks(values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return sent_bytes(size, dist.get_world_size()) / median(seconds[1:])
