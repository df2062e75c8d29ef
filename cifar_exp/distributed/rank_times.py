"""Where each rank's time went, and for whom the others waited: pure arithmetic.

No clock is shared between ranks. In each step all of them wait until gradients are averaged; the last to come waits for
the averaging alone, so what another rank waits beyond that, it waits for the last one.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

MEASURED = ("compute", "data", "evaluation", "hidden_communication")  # by each rank itself, in this order
NAMES = (*MEASURED, "communication", "waiting")
CLOCKED = ("hidden_communication", "communication", "waiting")  # known only where each step's averaging is clocked
PREFIX = "rank_time/"
OFTEN = 0.5  # of the steps: a rank that is the last one more often is a straggler
NOTABLE = 0.02  # share of their time that the others wait for it


@dataclass
class RankTimes:
    """Seconds of each rank, summed over epochs.

    Attributes:
        seconds: by ``NAMES`` and rank. ``compute`` is steps without data and waiting, ``hidden_communication`` the
            averaging of gradients while a backward pass goes on (or waiting for a slower rank's), which is part of
            ``compute``'s time; ``communication`` is exposed averaging, ``waiting`` that for the slowest rank. The
            three are 0 where the host cannot see them, as on GPUs, and are then part of ``compute``. What synchronised
            batch norms wait is in ``compute``. ``evaluation`` is validation, with the wait for other ranks' shares.
        last: steps in which each rank was the last to come.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    last: list[int] = field(default_factory=list)

    def add(self, rows: Sequence[Sequence[float]]) -> None:
        """Add what the ranks have measured: a row each of seconds by ``MEASURED``, then what each step waited for
        gradients.
        """
        waits = list(zip(*(row[len(MEASURED) :] for row in rows), strict=True))  # (steps, ranks)
        averaging = sum(min(step) for step in waits)
        new = {name: [row[place] for row in rows] for place, name in enumerate(MEASURED)}
        new["communication"] = [averaging] * len(rows)
        new["waiting"] = [sum(step[rank] - min(step) for step in waits) for rank in range(len(rows))]
        if len(self.last) != len(rows):  # begun, or gone on with on another number of ranks
            self.seconds, self.last = {name: [0.0] * len(rows) for name in NAMES}, [0] * len(rows)
        for name, values in new.items():
            self.seconds[name] = [before + more for before, more in zip(self.seconds[name], values, strict=True)]
        for step in waits:
            self.last[step.index(min(step))] += 1

    def metrics(self) -> dict[str, float]:
        """As ``rank_time/<rank>/<name>`` in seconds, and the share of steps in which the rank was the last one.

        What no step's clock has seen is left out: it is not known, which is not 0.
        """
        steps = sum(self.last)
        figures = {
            f"{PREFIX}{rank}/{name}": value
            for name, values in self.seconds.items()
            if steps or name not in CLOCKED
            for rank, value in enumerate(values)
        }
        return figures | {f"{PREFIX}{rank}/last_share": count / steps for rank, count in enumerate(self.last) if steps}

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes."""
        return deepcopy(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.__init__(**deepcopy(dict(state)))  # type: ignore[misc]


def by_rank(metrics: Mapping[str, float]) -> list[dict[str, float]]:
    """What :meth:`RankTimes.metrics` has told, a dictionary a rank; none for a lone rank."""
    ranks: dict[int, dict[str, float]] = {}
    for name, value in metrics.items():
        if name.startswith(PREFIX):
            rank, _, figure = name.removeprefix(PREFIX).partition("/")
            ranks.setdefault(int(rank), {})[figure] = value
    return [ranks[rank] for rank in sorted(ranks)]


def straggler(ranks: Sequence[Mapping[str, float]]) -> str | None:
    """A sentence about the rank that the others wait for; None where there is none.

    It is one that comes last in more than half of the steps, for which the others wait more than 2 % of their training.
    """
    if not ranks or "last_share" not in ranks[0]:
        return None
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank]["last_share"])
    others = [times for rank, times in enumerate(ranks) if rank != slowest]
    share = sum(times["waiting"] for times in others) / sum(training_seconds(times) for times in others)
    if ranks[slowest]["last_share"] <= OFTEN or share <= NOTABLE:
        return None
    return (
        f"straggler: rank {slowest} came last in {ranks[slowest]['last_share']:.0%} of the steps; the others waited "
        f"{share:.1%} of their training time for it"
    )


def training_seconds(times: Mapping[str, float]) -> float:
    """Of a rank, evaluation excluded."""
    return sum(times.get(name, 0.0) for name in ("compute", "data", "communication", "waiting"))
