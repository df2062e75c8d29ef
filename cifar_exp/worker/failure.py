"""A rank's report to the launcher: why it failed."""

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
        exit_code: of an error that the user can fix; None for other errors.
        message: the error in one line.
        traceback: the whole traceback.
    """

    rank: int
    time: float
    exit_code: int | None
    message: str
    traceback: str

    def save(self, ipc_dir: Path, attempt: int) -> None:
        """Write the report in an atomic write: the launcher may read it at any moment.

        Args:
            ipc_dir: the folder that ranks and launcher share.
            attempt: which start of the ranks failed, counted from 0.
        """
        path = ipc_dir / f"failure-{attempt}-{self.rank}.json"
        write_atomically(path, json.dumps(vars(self)), durable=False)

    @classmethod
    def of_attempt(cls, ipc_dir: Path, attempt: int) -> "list[RankFailure]":
        """The reports of one attempt. A killed rank leaves no report."""
        return [cls(**json.loads(path.read_text())) for path in ipc_dir.glob(f"failure-{attempt}-*.json")]

    def raise_if_lasting(self) -> None:
        """Raise the reported error if a restart cannot fix it."""
        for kind in (ConfigError, DataError, MachineError, DivergenceError, StorageError):
            if self.exit_code == kind.exit_code:
                raise kind(self.message.partition(": ")[2])
