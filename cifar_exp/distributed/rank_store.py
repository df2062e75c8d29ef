"""The store that hosts share, in the form in which torch's process groups take it."""

from datetime import timedelta

import torch.distributed as dist

from cifar_exp.distributed.host_store import HostStore


class RankStore(dist.Store):  # type: ignore[misc, name-defined]
    """A ``torch.distributed.Store`` on top of a :class:`HostStore`."""

    def __init__(self, store: HostStore, timeout: float) -> None:
        """``timeout``: seconds that :meth:`get` waits for a key."""
        super().__init__()
        self._store, self._seconds = store, timeout

    def set(self, key: str, value: str | bytes) -> None:
        self._store.set(key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        self.wait([key])
        value = self._store.get(key)
        assert value is not None
        return value

    def add(self, key: str, amount: int) -> int:
        return self._store.add(key, amount)

    def check(self, keys: list[str]) -> bool:
        return self._store.wait(keys, 0)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        seconds = self._seconds if timeout is None else timeout.total_seconds()
        if not self._store.wait(keys, seconds):
            raise dist.DistStoreError(f"no other rank has set {', '.join(keys)} in {seconds:g} s")

    def set_timeout(self, timeout: timedelta) -> None:
        self._seconds = timeout.total_seconds()
