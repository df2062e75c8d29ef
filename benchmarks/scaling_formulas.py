"""Formulas of data-parallel training: all-reduce by ring and tree, the slowest rank, failures and checkpoints.

Times are in seconds, sizes in bytes. docs/scaling.md names the sources. tests/project/test_scaling_simulator.py
compares the formulas with closed forms and the random draws with the formulas.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import integrate
from scipy.stats import norm

# Communication


@dataclass(frozen=True)
class Link:
    """A connection between ranks.

    Attributes:
        latency: seconds until the first byte of a message has arrived.
        bandwidth: bytes/s that a rank sends while it receives as many.
    """

    latency: float
    bandwidth: float


def ring_seconds(size: float, ranks: int, link: Link) -> float:
    """All-reduce of ``size`` bytes in a ring: 2 (n - 1) steps, in each of which a rank sends ``size`` / n bytes."""
    return 2 * (ranks - 1) * (link.latency + size / ranks / link.bandwidth)


def tree_seconds(size: float, ranks: int, link: Link) -> float:
    """All-reduce of ``size`` bytes in two binary trees, up and down: log2(n) hops each way, pieces follow each other.

    Every rank is a leaf of one tree and an inner node of the other, so it sends ``size`` bytes up and down in all.
    """
    if ranks == 1:
        return 0.0
    return 2 * (math.ceil(math.log2(ranks)) * link.latency + size / link.bandwidth)


@dataclass(frozen=True)
class Cluster:
    """Hosts with the same number of ranks.

    Attributes:
        inside: the link between the ranks of a host.
        between: the link of a host's every rank to the other hosts. A network card that ranks share is divided by them.
        ranks_per_host: ranks of a host.
    """

    inside: Link
    between: Link
    ranks_per_host: int

    def allreduce_seconds(self, size: float, ranks: int) -> float:
        """Within each host a ring's first half, then the faster of ring and tree between hosts, then its second half.

        Between hosts each rank averages its own part of ``size``.
        """
        local = min(ranks, self.ranks_per_host)
        hosts = math.ceil(ranks / self.ranks_per_host)
        part = size / local
        return ring_seconds(size, local, self.inside) + min(
            ring_seconds(part, hosts, self.between), tree_seconds(part, hosts, self.between)
        )


def exposed_seconds(ready: Sequence[float], seconds: Sequence[float], backward_end: float) -> float:
    """Communication after the backward pass, in seconds, if buckets are sent one after the other once they are ready.

    Args:
        ready: when the gradients of each bucket are complete, in order.
        seconds: duration of each bucket's all-reduce.
        backward_end: the end of the backward pass.
    """
    end = 0.0
    for begin, duration in zip(ready, seconds, strict=True):
        end = max(end, begin) + duration
    return max(0.0, end - backward_end)


# Stragglers


def slowest_of(ranks: int) -> float:
    """Expected largest of ``ranks`` independent standard normal values; 1/sqrt(pi) for two."""
    if ranks == 1:
        return 0.0

    def density(x: float) -> float:
        return float(x * ranks * norm.pdf(x) * norm.cdf(x) ** (ranks - 1))

    value, _ = integrate.quad(density, -10, 10, limit=200)
    return float(value)


def simulated_step(seconds: float, spread: float, ranks: int, draws: int = 4000, seed: int = 0) -> float:
    """Mean duration of a step in which all ranks wait for the slowest one, by random draws.

    Args:
        seconds: mean of one rank.
        spread: standard deviation of a rank's step over its mean.
        ranks: number of ranks.
        draws: simulated steps.
        seed: of the random numbers.
    """
    rng = np.random.default_rng(seed)
    return float(seconds * (1 + spread * rng.standard_normal((draws, ranks)).max(axis=1).mean()))


# Failures and checkpoints; all times in one unit


def young_interval(cost: float, mtbf: float) -> float:
    """Young's (1974) first-order optimum of the work between two checkpoints: sqrt(2 cost mtbf)."""
    return math.sqrt(2 * cost * mtbf)


def daly_interval(cost: float, mtbf: float) -> float:
    """Daly's (2006) higher-order optimum of the work between two checkpoints."""
    if cost >= 2 * mtbf:
        return mtbf
    share = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(share) / 3 + share / 9) - cost


def expected_runtime(work: float, interval: float, cost: float, restart: float, mtbf: float) -> float:
    """Expected time for ``work`` with failures at random (exponential) times; Daly's (2006) complete model.

    A failure may also hit a checkpoint or a restart. After each ``interval`` of work a checkpoint takes ``cost``.
    """
    return mtbf * math.exp(restart / mtbf) * math.expm1((interval + cost) / mtbf) * work / interval


def simulated_runtime(
    work: float, interval: float, cost: float, restart: float, mtbf: float, seed: int = 0, runs: int = 200
) -> float:
    """The same by random draws: mean time over ``runs`` simulated runs."""
    rng = np.random.default_rng(seed)
    total = 0.0
    for _ in range(runs):
        for _ in range(round(work / interval)):
            while (fails := rng.exponential(mtbf)) < interval + cost:
                total += fails
                while (again := rng.exponential(mtbf)) < restart:  # it fails while it restarts
                    total += again
                total += restart
            total += interval + cost
    return total / runs
