"""How a rank tells the launcher why it failed."""

import json
from dataclasses import dataclass
from pathlib import Path

from cifar_exp.errors import ConfigError, DataError, DivergenceError, MachineError, StorageError
from cifar_exp.system.atomic_files import write_atomically


@dataclass(frozen=True)
class RankFailure:
    """Why a rank failed, as it told the launcher before it ended.

    Attributes:
        rank: which one.
        time: when, seconds since the epoch.
        exit_code: the error's own where the user can mend it, else None.
        message: the error in one line.
        traceback: the whole traceback.
    """

    rank: int
    time: float
    exit_code: int | None
    message: str
    traceback: str

    def save(self, exchange: Path, attempt: int) -> None:
        """Leave word. The launcher may look at any moment, and sees the whole of it or nothing."""
        path = exchange / f"failure-{attempt}-{self.rank}.json"
        write_atomically(path, json.dumps(vars(self)), durable=False)

    @classmethod
    def of_attempt(cls, exchange: Path, attempt: int) -> "list[RankFailure]":
        """Those of the ranks' ``attempt``-th start, counted from 0, that had the time to tell."""
        return [cls(**json.loads(path.read_text())) for path in exchange.glob(f"failure-{attempt}-*.json")]

    def raise_if_lasting(self) -> None:
        """Raise again what would come again: an error that is the user's to mend."""
        for kind in (ConfigError, DataError, MachineError, DivergenceError, StorageError):
            if self.exit_code == kind.exit_code:
                raise kind(self.message.partition(": ")[2])
