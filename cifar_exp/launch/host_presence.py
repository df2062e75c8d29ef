"""Which of the other hosts of a run are there. Each of them counts up a key of its own; one that stops is lost."""

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from cifar_exp.distributed.host_store import HostStore, StoreClient, StoreClosedError

BEAT_SECONDS = 0.5
LOST_SECONDS = 10.0  # a host that has not counted up its key for so long is lost


@dataclass(frozen=True)
class OtherHost:
    """What another host says of itself.

    Attributes:
        rank: its launcher.host_rank.
        id: differs each time the command is started there.
        version: of the package.
    """

    rank: int
    id: str
    version: str

    @classmethod
    def read(cls, text: bytes) -> "OtherHost":
        """Read what :func:`announced` has written."""
        fields = json.loads(text)
        return cls(int(fields["rank"]), str(fields["id"]), str(fields["version"]))


@contextmanager
def announced(client: StoreClient, rank: int, version: str) -> Iterator[OtherHost]:
    """Tell host 0 that this host is there, as long as this context is open."""
    own = OtherHost(rank, uuid.uuid4().hex, version)
    closed = threading.Event()

    def count() -> None:
        with suppress(StoreClosedError):
            while not closed.wait(BEAT_SECONDS):
                client.add(f"beats/{own.id}", 1)

    client.leave_behind(f"gone/{own.id}")
    client.set(f"present/{rank}", json.dumps(asdict(own)).encode())
    threading.Thread(target=count, name="presence", daemon=True).start()
    try:
        yield own
    finally:
        closed.set()


class Presence:
    """Host 0's view of the other hosts."""

    def __init__(self, store: HostStore) -> None:
        self._store = store
        self._seen: dict[str, tuple[bytes | None, float]] = {}  # id -> its last count, and when that was new

    def hosts(self, most: int) -> dict[int, OtherHost]:
        """The other hosts that are there, by rank. ``most``: number of hosts at most, host 0 included."""
        texts = (self._store.get(f"present/{rank}") for rank in range(1, most))
        found = [OtherHost.read(text) for text in texts if text]
        return {host.rank: host for host in found if not self.is_lost(host)}

    def is_lost(self, host: OtherHost) -> bool:
        """Whether this host has ended, was started again, or has not counted for ``LOST_SECONDS``."""
        if self._store.get(f"gone/{host.id}") is not None:
            return True
        now, count = time.monotonic(), self._store.get(f"beats/{host.id}")
        before, since = self._seen.get(host.id, (None, now))
        if host.id not in self._seen or count != before:
            self._seen[host.id] = count, now
            return False
        return now - since > LOST_SECONDS
