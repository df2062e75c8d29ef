"""How a rank reports to the launcher why it failed."""

import json
from dataclasses import dataclass
from pathlib import Path

from cifar_exp.errors import ConfigError, DataError, DivergenceError, MachineError, StorageError
from cifar_exp.system.atomic_files import write_atomically


@dataclass(frozen=True)
class RankFailure:
    """A rank's report of its failure, written before it exits.

    Attributes:
        rank: which rank.
        time: seconds since the epoch.
        exit_code: of an error that the user can correct; None for any other.
        message: the error in one line.
        traceback: the whole traceback.
    """

    rank: int
    time: float
    exit_code: int | None
    message: str
    traceback: str

    def save(self, exchange: Path, attempt: int) -> None:
        """Write the report in an atomic write: the launcher may read it at any moment.

        Args:
            exchange: the folder that ranks and launcher share.
            attempt: which start of the ranks failed, counted from 0.
        """
        path = exchange / f"failure-{attempt}-{self.rank}.json"
        write_atomically(path, json.dumps(vars(self)), durable=False)

    @classmethod
    def of_attempt(cls, exchange: Path, attempt: int) -> "list[RankFailure]":
        """The reports of one attempt. A rank that was killed has left none."""
        return [cls(**json.loads(path.read_text())) for path in exchange.glob(f"failure-{attempt}-*.json")]

    def raise_if_lasting(self) -> None:
        """Raise the error again if a restart would meet it again: one that the user has to correct."""
        for kind in (ConfigError, DataError, MachineError, DivergenceError, StorageError):
            if self.exit_code == kind.exit_code:
                raise kind(self.message.partition(": ")[2])
