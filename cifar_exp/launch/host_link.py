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
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from cifar_exp.distributed.host_place import HostPlace
from cifar_exp.distributed.host_store import HostStore, StoreClosedError
from cifar_exp.distributed.stop_requests import AGREED_FILE, INTERRUPT_FILE, KNOWN_TO_ALL_HOSTS_FILE, interrupted_by
from cifar_exp.errors import CifarExpError, Stopped, WorkerError, error_of_code
from cifar_exp.launch import rank_processes
from cifar_exp.launch.host_presence import LOST_SECONDS, OtherHost, Presence
from cifar_exp.launch.watchdog import RankState, Watchdog, hung_ranks
from cifar_exp.system.atomic_files import write_atomically

CHUNK = 2**23  # bytes of a checkpoint in one message
INTERVAL = 0.2  # seconds between two looks at the store
CAUSE_SECONDS = 5.0  # how long a failed host waits for another host to report the cause
GOODBYE_SECONDS = 3.0
_EFFECT = re.compile(r"gloo|nccl|connection (closed|reset)|StoreClosed|DistStoreError", re.IGNORECASE)


@dataclass(frozen=True)
class HostFailure:
    """Why the ranks of one host have failed.

    Attributes:
        host: its launcher.host_rank.
        code: exit code; over 128 for a signal.
        message: the message for the user.
    """

    host: int
    code: int
    message: str

    @property
    def is_effect(self) -> bool:
        """Whether the failure looks like the effect of another host's: a broken connection."""
        return self.code == WorkerError.exit_code and bool(_EFFECT.search(self.message))

    def as_error(self) -> CifarExpError:
        """The failure as an error of host 0, with the same exit code."""
        return error_of_code(self.code, f"host {self.host}: {self.message}")


@dataclass
class HostLink:
    """One host's end of the link. A context: inside it, a thread looks at the store.

    Attributes:
        place: this host.
        host: its launcher.host_rank.
        store: of host 0; its keys belong to this start of the ranks.
        ipc_dir: the folder that this host's ranks and launcher share.
        members: on host 0, the other hosts by their place.
        presence: on host 0, which hosts are there.
        error: why the ranks were ended from outside; None while they were not.
    """

    place: HostPlace
    host: int
    store: HostStore
    ipc_dir: Path
    members: Mapping[int, OtherHost] = field(default_factory=dict)
    presence: Presence | None = None
    error: CifarExpError | None = None
    watchdog: Watchdog | None = None
    _closed: threading.Event = field(default_factory=threading.Event)
    _is_stop_passed_on: bool = False
    _have_ranks_ended: bool = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="host link", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._closed.set()
        if isinstance(error, Stopped):
            with suppress(StoreClosedError):
                self._report(HostFailure(self.host, error.exit_code, str(error)))

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self.place.hosts) if rank != self.place.host_rank]

    def failed(self, failure: CifarExpError) -> CifarExpError:
        """Report that this host's ranks have failed. Returns the cause, which may be another host's failure."""
        self._have_ranks_ended = True
        with suppress(StoreClosedError):
            own = HostFailure(self.host, failure.exit_code, str(failure))
            self._report(own)
            if self.place.host_rank:
                return self._end_of_host_0() or self.error or failure
            until = time.monotonic() + CAUSE_SECONDS
            while own.is_effect and time.monotonic() < until:
                if causes := [found for found in self._failures() if not found.is_effect]:
                    return causes[0].as_error()
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
            if ended := self._end_of_host_0():
                raise ended
            return
        wanted = [f"done/{rank}" for rank in self._others]
        while not self.store.wait(wanted, INTERVAL):
            if self.error:
                raise self.error
            if failures := self._failures():
                raise failures[0].as_error()
            for place, host in self.members.items():
                if self._is_lost(place, host):
                    raise _lost(host)

    def _report(self, failure: HostFailure) -> None:
        self.store.set(f"failure/{self.place.host_rank}", json.dumps(vars(failure)).encode())

    def _failures(self) -> list[HostFailure]:
        found = [self.store.get(f"failure/{rank}") for rank in self._others]
        return [HostFailure(**json.loads(text)) for text in found if text is not None]

    def _end_of_host_0(self) -> CifarExpError | None:
        """Wait for the end on host 0. Returns host 0's error; None if there is none, or host 0 is lost."""
        while not self._closed.wait(INTERVAL):
            if (text := self.store.get("end")) is not None:
                return ended_by_host_0(text)
            if self.error:
                return self.error
        return None

    def _watch(self) -> None:
        while not self._closed.wait(INTERVAL):
            try:
                self._look()
            except StoreClosedError:
                self._end_ranks(WorkerError("host 0 is lost: its connection is closed. The ranks here were ended"))
                return

    def _look(self) -> None:
        self._pass_on_interrupt()
        self._pass_on_hung_ranks()
        if self.place.host_rank:
            self._take_stop_point()
            is_stopping = (self.ipc_dir / AGREED_FILE).exists()
            if not self._have_ranks_ended and not is_stopping and (text := self.store.get("end")) is not None:
                self._end_ranks(ended_by_host_0(text) or WorkerError("host 0 has ended the run"))
            return
        self._pass_on_stop_point()
        if not (self.ipc_dir / KNOWN_TO_ALL_HOSTS_FILE).exists():  # else the ranks here are about to end
            self._end_ranks_if_a_host_failed()

    def _end_ranks_if_a_host_failed(self) -> None:
        if causes := [found for found in self._failures() if not found.is_effect]:
            self._end_ranks(causes[0].as_error())
        for place, host in self.members.items():
            if self._is_lost(place, host):
                self._end_ranks(_lost(host))

    def _is_lost(self, place: int, host: OtherHost) -> bool:
        """Whether another host has ended without saying how."""
        if not self.presence or not self.presence.is_lost(host):
            return False
        return not any(self.store.wait([f"{said}/{place}"], 0) for said in ("done", "failure"))

    def _pass_on_interrupt(self) -> None:
        """A signal on any host interrupts all: the file of one becomes the key of the store, and the other way."""
        file = self.ipc_dir / INTERRUPT_FILE
        if file.exists():
            self.store.set("interrupt", str(interrupted_by(self.ipc_dir)).encode())
        elif (number := self.store.get("interrupt")) is not None:
            with suppress(OSError):
                write_atomically(file, number, durable=False)

    def _pass_on_hung_ranks(self) -> None:
        """If no rank of any host sends heartbeats, host 0 finds the hung ones, and their host kills them."""
        if self.watchdog is None:
            return
        states = None if self._have_ranks_ended else [vars(state) for state in self.watchdog.silent_states()]
        self.store.set(f"silent/{self.place.host_rank}", json.dumps(states).encode())
        if not self.place.host_rank:
            texts = [self.store.get(f"silent/{rank}") for rank in range(self.place.hosts)]
            running: list[list[Any]] = [states for text in texts if (states := json.loads(text or b"[]")) is not None]
            if running and all(running):
                every = [RankState(**state) for states in running for state in states]
                hung = hung_ranks(every, self.watchdog.timeout)
                self.store.set("hung", json.dumps(hung).encode())
        if text := self.store.get("hung"):
            self.watchdog.end({int(rank): message for rank, message in json.loads(text).items()})

    def _pass_on_stop_point(self) -> None:
        """Rank 0 waits at its stop point until every host knows it."""
        agreed = self.ipc_dir / AGREED_FILE
        if not self._is_stop_passed_on and agreed.exists():
            self.store.set("agreed", agreed.read_bytes())
            self._is_stop_passed_on = True
        if self._is_stop_passed_on and self.store.wait([f"agreed/{rank}" for rank in self._others], 0):
            with suppress(OSError):
                (self.ipc_dir / KNOWN_TO_ALL_HOSTS_FILE).touch()

    def _take_stop_point(self) -> None:
        agreed = self.ipc_dir / AGREED_FILE
        if not agreed.exists() and (text := self.store.get("agreed")) is not None:
            write_atomically(agreed, text, durable=False)
            self.store.set(f"agreed/{self.place.host_rank}", b"")

    def _end_ranks(self, error: CifarExpError) -> None:
        """Kill this host's ranks, and end torch elastic."""
        if self.error is None and not self._closed.is_set():
            self.error = error
            if self._have_ranks_ended:
                return
            # Before elastic has its handler, the signal would end this process.
            while signal.getsignal(signal.SIGQUIT) == signal.SIG_DFL and not self._closed.wait(0.05):
                pass
            rank_processes.kill_ranks()
            if not self._have_ranks_ended and not self._closed.is_set():
                os.kill(os.getpid(), signal.SIGQUIT)


def _lost(host: OtherHost) -> WorkerError:
    return WorkerError(
        f"host {host.rank} is lost: its command has ended, or has not answered for {LOST_SECONDS:g} s. Set resume=auto "
        f"to continue from the last checkpoint, or launcher.max_restarts=3 to do so when the host is back"
    )


def ended_by_host_0(text: bytes) -> CifarExpError | None:
    """Host 0's error from what it wrote at the end of a start of the ranks; None if all went well."""
    ended = json.loads(text)
    return error_of_code(int(ended["code"]), str(ended["message"])) if ended["code"] else None
