"""How each rank spent its time, and for which rank the others waited. Pure arithmetic.

Ranks share no clock. In each step all ranks wait until gradients are averaged. The slowest rank, the straggler, comes
last, so its all-reduce time is the shortest. A rank's waiting time is its all-reduce time minus the straggler's.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

MEASURED = ("compute", "data", "evaluation", "hidden_communication")  # by each rank; the order of columns
NAMES = (*MEASURED, "communication", "waiting")
CLOCKED = (
    "hidden_communication",
    "communication",
    "waiting",
)  # known only where the averaging of each step is measured
PREFIX = "rank_time/"
STRAGGLER_SHARE = 0.5  # share of the steps; a straggler is last in a larger share
NOTABLE = 0.02  # share of the other ranks' training time; they wait longer than that for a straggler


@dataclass
class RankTimes:
    """Seconds of each rank, summed over epochs.

    Attributes:
        seconds: by the names in ``NAMES``, then by rank.

            - ``compute``: steps without data, communication and waiting; synchronized batch norms are in it.
            - ``data``: making batches.
            - ``evaluation``: validation, with the wait for other ranks' shares.
            - ``hidden_communication``: overlapped communication: gradient averaging during a backward pass; part of
              ``compute``.
            - ``communication``: exposed gradient averaging.
            - ``waiting``: for the slowest rank.

            The last three are 0 where the host cannot measure them, as on GPUs; ``compute`` then contains them.
        last: per rank, the number of steps in which it was the straggler.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    last: list[int] = field(default_factory=list)

    def add(self, rows: Sequence[Sequence[float]]) -> None:
        """Add one row per rank: its seconds by ``MEASURED``, then its exposed all-reduce time in each step."""
        waits = list(zip(*(row[len(MEASURED) :] for row in rows), strict=True))  # (steps, ranks)
        averaging = sum(min(step) for step in waits)
        new = {name: [row[place] for row in rows] for place, name in enumerate(MEASURED)}
        new["communication"] = [averaging] * len(rows)
        new["waiting"] = [sum(step[rank] - min(step) for step in waits) for rank in range(len(rows))]
        if len(self.last) != len(rows):  # the first rows, or resumed on another number of ranks
            self.seconds, self.last = {name: [0.0] * len(rows) for name in NAMES}, [0] * len(rows)
        for name, values in new.items():
            self.seconds[name] = [before + more for before, more in zip(self.seconds[name], values, strict=True)]
        for step in waits:
            self.last[step.index(min(step))] += 1

    def metrics(self) -> dict[str, float]:
        """As ``rank_time/<rank>/<name>`` in seconds, and the share of steps in which the rank was the slowest.

        Times that were not measured are left out: unknown is not 0.
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
        """The state for :meth:`load_state_dict`."""
        return deepcopy(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state."""
        self.__init__(**deepcopy(dict(state)))  # type: ignore[misc]


def by_rank(metrics: Mapping[str, float]) -> list[dict[str, float]]:
    """The metrics of :meth:`RankTimes.metrics`, one dictionary per rank; empty for a single rank's run."""
    ranks: dict[int, dict[str, float]] = {}
    for name, value in metrics.items():
        if name.startswith(PREFIX):
            rank, _, figure = name.removeprefix(PREFIX).partition("/")
            ranks.setdefault(int(rank), {})[figure] = value
    return [ranks[rank] for rank in sorted(ranks)]


def straggler(ranks: Sequence[Mapping[str, float]]) -> str | None:
    """A sentence about the straggler; None if there is none.

    A straggler is the slowest rank in more than half of the steps, and the others wait for it for more than 2 % of
    their training time.
    """
    if not ranks or "last_share" not in ranks[0]:
        return None
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank]["last_share"])
    others = [times for rank, times in enumerate(ranks) if rank != slowest]
    share = sum(times["waiting"] for times in others) / sum(training_seconds(times) for times in others)
    if ranks[slowest]["last_share"] <= STRAGGLER_SHARE or share <= NOTABLE:
        return None
    return (
        f"straggler: rank {slowest} came last in {ranks[slowest]['last_share']:.0%} of the steps; the others waited "
        f"{share:.1%} of their training time for it"
    )


def training_seconds(times: Mapping[str, float]) -> float:
    """A rank's training time, without evaluation."""
    return sum(times.get(name, 0.0) for name in ("compute", "data", "communication", "waiting"))
