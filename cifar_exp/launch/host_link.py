"""The link between the hosts of one run: it carries signals, stop points, failures and the end of the run.

Each host supervises its own ranks with torch elastic. A thread passes on between the folder that a host's ranks and its
launcher share and the store of host 0. So ranks only know their host's folder.
"""

import json
import os
import re
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from cifar_exp.distributed.host_place import HostPlace
from cifar_exp.distributed.host_store import StoreClient, StoreClosedError, StoreServer
from cifar_exp.distributed.stop_requests import AGREED_FILE, INTERRUPT_FILE, KNOWN_TO_ALL_HOSTS_FILE
from cifar_exp.errors import CifarExpError, WorkerError
from cifar_exp.launch import rank_processes
from cifar_exp.system.atomic_files import write_atomically

INTERVAL = 0.2  # seconds between two looks at the store
LOST_SECONDS = 10.0  # a host that has not looked for so long is lost
CAUSE_SECONDS = 5.0  # how long a failed host waits for another host to report the cause
GOODBYE_SECONDS = 3.0
_EFFECT = re.compile(r"gloo|nccl|connection (closed|reset)|StoreClosed|DistStoreError", re.IGNORECASE)


class HostEndedError(CifarExpError):
    """Host 0 has ended the run. ``exit_code`` is its own."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc]


@dataclass(frozen=True)
class HostFailure:
    """Why the ranks of one host have failed.

    Attributes:
        host_rank: the host.
        code: exit code.
        message: the message for the user.
    """

    host_rank: int
    code: int
    message: str

    @property
    def is_effect(self) -> bool:
        """Whether the failure looks like the effect of another host's: a broken connection."""
        return self.code == WorkerError.exit_code and bool(_EFFECT.search(self.message))


@dataclass
class HostLink:
    """One host's end of the link. A context: inside it, a thread looks at the store.

    Attributes:
        place: this host.
        store: host 0's server, or a client of it.
        ipc_dir: the folder that this host's ranks and launcher share.
        error: why the ranks were ended from outside; None while they were not.
    """

    place: HostPlace
    store: StoreServer | StoreClient
    ipc_dir: Path
    error: CifarExpError | None = None
    _seen: dict[int, tuple[bytes | None, float]] = field(default_factory=dict)  # host -> its last look, and when
    _closed: threading.Event = field(default_factory=threading.Event)
    _is_stop_passed_on: bool = False
    _have_ranks_ended: bool = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="host link", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.place.hosts) if rank != self.place.host_rank]

    def failed(self, failure: CifarExpError) -> CifarExpError:
        """Report that this host's ranks have failed. Returns the cause, which may be another host's failure."""
        self._have_ranks_ended = True
        with suppress(StoreClosedError):
            own = HostFailure(self.place.host_rank, failure.exit_code, str(failure))
            self.store.set(f"failure/{self.place.host_rank}", json.dumps(vars(own)).encode())
            if self.place.host_rank:
                return self._end_of_host_0() or self.error or failure
            until = time.monotonic() + CAUSE_SECONDS
            while own.is_effect and time.monotonic() < until:
                causes = [found for found in self._failures() if not found.is_effect]
                if causes:
                    return self.as_error(causes[0])
                if self.error:
                    return self.error
                time.sleep(INTERVAL)
        return self.error or failure

    def succeeded(self) -> None:
        """Report that this host's ranks have ended well. Host 0 waits for the other hosts, and they wait for host 0.

        Raises:
            CifarExpError: another host has failed.
        """
        self._have_ranks_ended = True
        self.store.set(f"done/{self.place.host_rank}", b"")
        if self.place.host_rank:
            ended = self._end_of_host_0()
            if ended and ended.exit_code:
                raise ended
            return
        wanted = [f"done/{rank}" for rank in self._others]
        while not self.store.wait(wanted, INTERVAL):
            if self.error:
                raise self.error

    def end(self, code: int, message: str = "") -> None:
        """Host 0 tells the other hosts that the run has ended, and waits a moment until they have read it."""
        self.store.set("end", json.dumps({"code": code, "message": message}).encode())
        self.store.wait([f"bye/{rank}" for rank in self._others], GOODBYE_SECONDS)

    def ended_by_host_0(self) -> HostEndedError | None:
        """How host 0 has ended the run; None while it has not."""
        ended = self.store.get("end")
        if ended is None:
            return None
        self.store.set(f"bye/{self.place.host_rank}", b"")
        return _host_0_ended(json.loads(ended))

    def as_error(self, failure: HostFailure) -> CifarExpError:
        """The failure of another host as an error of this one, with that host's exit code."""
        return HostEndedError(f"host {failure.host_rank}: {failure.message}", failure.code)

    def _failures(self) -> list[HostFailure]:
        found = [self.store.get(f"failure/{rank}") for rank in self._others]
        return [HostFailure(**json.loads(text)) for text in found if text is not None]

    def _end_of_host_0(self) -> HostEndedError | None:
        """Wait for the end of the run on host 0; None if host 0 is lost."""
        while not self._closed.wait(INTERVAL):
            if ended := self.ended_by_host_0():
                return ended
        return None

    def _watch(self) -> None:
        while not self._closed.wait(INTERVAL):
            try:
                self._look()
            except StoreClosedError:
                self._end_ranks(WorkerError("host 0 is lost: the connection to it is closed. Its ranks were ended"))
                return

    def _look(self) -> None:
        self.store.add(f"looks/{self.place.host_rank}", 1)
        self._pass_on_interrupt()
        if self.place.host_rank:
            self._take_stop_point()
            is_stopping = (self.ipc_dir / AGREED_FILE).exists()
            if not self._have_ranks_ended and not is_stopping and (ended := self.store.get("end")) is not None:
                self._end_ranks(_host_0_ended(json.loads(ended)))
        else:
            self._pass_on_stop_point()
            self._find_lost_hosts()
            causes = sorted(self._failures(), key=lambda found: found.is_effect)
            if causes and not causes[0].is_effect:
                self._end_ranks(self.as_error(causes[0]))

    def _pass_on_interrupt(self) -> None:
        """A signal on any host interrupts all: the file of one becomes the key of the store, and the other way."""
        file = self.ipc_dir / INTERRUPT_FILE
        if file.exists():
            self.store.set("interrupt", b"")
        elif self.store.get("interrupt") is not None:
            with suppress(OSError):
                file.touch()

    def _pass_on_stop_point(self) -> None:
        """Rank 0 waits at its stop point until every host knows it."""
        agreed = self.ipc_dir / AGREED_FILE
        if not self._is_stop_passed_on and agreed.exists():
            self.store.set("agreed", agreed.read_bytes())
            self._is_stop_passed_on = True
        if self._is_stop_passed_on and self.store.wait([f"agreed/{rank}" for rank in self._others], 0):
            (self.ipc_dir / KNOWN_TO_ALL_HOSTS_FILE).touch()

    def _take_stop_point(self) -> None:
        agreed = self.ipc_dir / AGREED_FILE
        if not agreed.exists() and (text := self.store.get("agreed")) is not None:
            write_atomically(agreed, text, durable=False)
            self.store.set(f"agreed/{self.place.host_rank}", b"")

    def _find_lost_hosts(self) -> None:
        now = time.monotonic()
        for rank in self._others:
            looks, since = self.store.get(f"looks/{rank}"), self._seen.get(rank, (None, now))
            if looks != since[0] or rank not in self._seen:
                self._seen[rank] = looks, now
            elif now - since[1] > LOST_SECONDS and self.store.get(f"bye/{rank}") is None:
                self._end_ranks(
                    WorkerError(
                        f"host {rank} is lost: it has not answered for {LOST_SECONDS:g} s. Set resume=auto to continue "
                        f"from the last checkpoint"
                    )
                )

    def _end_ranks(self, error: CifarExpError) -> None:
        """Kill this host's ranks, and end torch elastic."""
        if self.error is None and not self._closed.is_set():
            self.error = error
            if self._have_ranks_ended:
                return
            rank_processes.kill_ranks()
            os.kill(os.getpid(), signal.SIGQUIT)


def _host_0_ended(ended: dict[str, Any]) -> HostEndedError:
    return HostEndedError(ended["message"] or "host 0 has ended the run", ended["code"])
