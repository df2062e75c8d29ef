"""Measure how a rank spends its time."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from cifar_exp.distributed.collectives import all_gather_numbers
from cifar_exp.distributed.data_parallel import Communication
from cifar_exp.distributed.rank_times import MEASURED

T = TypeVar("T")


@dataclass
class Stopwatch:
    """Seconds by name. Spans may be nested: the time of an inner span is not part of the outer one."""

    seconds: dict[str, float] = field(default_factory=dict)
    _running: list[str] = field(default_factory=list)
    _since: float = 0.0

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the time spent in the block to ``name``."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def add(self, other: "Stopwatch") -> None:
        """Add the seconds of another stopwatch."""
        for name, seconds in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def move(self, seconds: float, source: str, target: str) -> None:
        """Move ``seconds`` from ``source`` to ``target``."""
        self.seconds[source] = self.seconds.get(source, 0.0) - seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds

    def _switch(self) -> None:
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


def timed(items: Iterable[T], watch: Stopwatch, name: str) -> Iterator[T]:
    """Yield the same items. The time to produce each item is added to ``name``."""
    source = iter(items)
    nothing = object()
    while True:
        with watch.span(name):
            item = next(source, nothing)
        if item is nothing:
            return
        yield item  # type: ignore[misc]


@dataclass
class OwnTimes:
    """The times of this rank since the last all-gather of times.

    Attributes:
        seconds: by the names in ``rank_times.MEASURED``.
        exposed: seconds of exposed gradient averaging, one value per step.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEASURED, 0.0))
    exposed: list[float] = field(default_factory=list)

    def add_steps(self, watch: Stopwatch, before: Mapping[str, float], communication: Communication) -> None:
        """Add the time of ``watch`` since ``before``.

        Exposed (not overlapped) gradient averaging moves from ``step`` to ``communication``.
        """
        exposed, overlapped = communication.take()
        watch.move(sum(exposed), "step", "communication")
        self.exposed += exposed
        self.seconds["hidden_communication"] += overlapped
        for name, span in (("compute", "step"), ("data", "data")):
            self.seconds[name] += watch.seconds.get(span, 0.0) - before.get(span, 0.0)

    def all_gather(self, device: torch.device) -> list[list[float]]:
        """Return every rank's times as a row, the input of ``RankTimes.add``, and reset the times."""
        everyone: list[list[float]] = all_gather_numbers([*self.seconds.values(), *self.exposed], device).tolist()
        self.seconds, self.exposed = dict.fromkeys(MEASURED, 0.0), []
        return everyone
