"""Host 0's side of a run over several hosts: it admits the others, sends them the job, and tells them how it ended.

Its server stays open for the whole command, so that the other hosts take part in every job of a sweep. Each start of
the ranks is a *round* with a number. The others get a round's settings as text and compose them as host 0 did.
"""

import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from cifar_exp.distributed.host_place import HostPlace
from cifar_exp.distributed.host_store import Prefixed, StoreServer
from cifar_exp.errors import CifarExpError, ConfigError, MachineError, Stopped, WorkerError, error_of_code
from cifar_exp.launch.host_link import CHUNK, GOODBYE_SECONDS
from cifar_exp.launch.host_presence import OtherHost, Presence
from cifar_exp.launch.host_session import opened
from cifar_exp.launch.host_settings import HostSettings, interface_of
from cifar_exp.records.run_folder import CHECKPOINTS
from cifar_exp.system.own_version import own_version
from cifar_exp.system.printable import print_notice
from cifar_exp.training.plan import shared_by
from cifar_exp.worker.job import Job

GATHER_SECONDS = 30.0  # when enough hosts have come, how long host 0 waits for more
INTERVAL = 0.2
MOST_HOSTS = 1024


class HostsMissingError(MachineError):
    """Not enough hosts have come in time."""


@dataclass(frozen=True)
class Admitted:
    """The hosts of one round.

    Attributes:
        store: with the keys of this round.
        place: host 0 among the hosts.
        members: the other hosts by their place.
    """

    store: Prefixed
    place: HostPlace
    members: dict[int, OtherHost]


class HostZero:
    """The other hosts, as host 0 sees them.

    Attributes:
        settings: the settings of the first run that needed them.
        presence: which hosts are there.
    """

    def __init__(self, settings: HostSettings) -> None:
        """Listen for the other hosts.

        Raises:
            MachineError: the address is not this host's, or the port is in use.
        """
        try:
            found = socket.getaddrinfo(*settings.rendezvous, type=socket.SOCK_STREAM)[0][4]
            self._server = StoreServer((str(found[0]), int(found[1])), settings.token)
        except OSError as error:
            raise MachineError(
                f"launcher.rendezvous={settings.name}: host 0 cannot listen there: {error.strerror or error}. Set it "
                f"to an address of this host and a free port"
            ) from error
        self.settings, self._interface = settings, interface_of(str(found[0]))
        self.presence = Presence(self._server)
        self._number = 0
        self._admitted: Admitted | None = None

    def close(self, code: int) -> None:
        """Tell the other hosts that the command has ended with this exit code, and stop listening."""
        if self._admitted:  # the run failed before its ranks were started
            with suppress(CifarExpError), self._ending(self._admitted, is_last=True):
                raise error_of_code(code or 1, "host 0 has failed")
        present = self.presence.hosts(MOST_HOSTS)
        self._server.set("closed", str(code).encode())
        self._server.wait([f"gone/{host.id}" for host in present.values()], GOODBYE_SECONDS)
        self._server.close()

    def admit(self, settings: HostSettings, job: Job) -> None:
        """Gather the hosts, and compare what they have found out about the job. The next :meth:`round` is with them.

        Args:
            settings: the hosts of this run.
            job: the job for all hosts, planned for the most hosts.

        Raises:
            ConfigError, DataError: another host differs, or refuses the job.
            MachineError: not enough hosts have come in time.
            WorkerError: a host was lost before the ranks started.
        """
        if self._admitted:
            with suppress(CifarExpError), self._ending(self._admitted, is_last=True):
                raise error_of_code(1, "an earlier job has failed")
            self._admitted = None
        members = self._gather(settings)
        for large in ("checkpoint", "ranks"):  # not the rest: a slow host may not have read the end yet
            self._server.forget(f"{self._number}/{large}/")
        self._number += 1
        store = Prefixed(self._server, f"{self._number}/")
        hosts, size = len(members) + 1, job.plan.world_size // settings.most
        place = HostPlace(hosts, 0, size, self._server.address, self._interface, store.prefix, self.settings.token)
        self._admitted = Admitted(store, place, members)
        with self._ending(self._admitted, is_last=True, only_failures=True):
            self._compare(self._admitted, job)

    @contextmanager
    def round(self, settings: HostSettings, job: Job, is_last: bool) -> Iterator[tuple[Job, "Admitted"]]:
        """Let the admitted hosts start their ranks, and at the end tell them how it ended.

        Args:
            settings: the hosts of this run.
            job: the job for all hosts, planned for the most hosts.
            is_last: whether a failure ends the run; else there is another round.

        Yields:
            The job for this host, and the hosts.

        Raises:
            CifarExpError: see :meth:`admit`; it is called if it was not.
        """
        if self._admitted is None:
            self.admit(settings, job)
        admitted, self._admitted = self._admitted, None
        assert admitted
        place = admitted.place
        with self._ending(admitted, is_last):
            placed = replace(job, place=place, plan=shared_by(job.plan, place.local_size * place.hosts))
            _send(admitted.store, placed)
            yield placed, admitted

    @contextmanager
    def _ending(self, admitted: "Admitted", is_last: bool, only_failures: bool = False) -> Iterator[None]:
        """Tell the other hosts how what is done inside this context has ended."""
        code, message = 1, "host 0 has failed"
        try:
            yield
            code, message = 0, ""
        except (CifarExpError, Stopped) as error:
            code, message = error.exit_code, str(error)
            raise
        finally:
            if code or not only_failures:
                again = not is_last and code == WorkerError.exit_code
                ended = {"code": code, "message": message, "again": again}
                admitted.store.set("end", json.dumps(ended).encode())
                admitted.store.wait([f"bye/{rank}" for rank in admitted.members], GOODBYE_SECONDS)

    def _gather(self, settings: HostSettings) -> dict[int, OtherHost]:
        """Wait until enough hosts have come. Returns them by their place, from 1."""
        fewest, most = settings.fewest, settings.most
        began, enough, said = time.monotonic(), None, False
        while True:
            present, now = self.presence.hosts(most), time.monotonic()
            if len(present) + 1 >= fewest:
                enough = now if enough is None else enough
            if len(present) + 1 == most or (enough is not None and now - enough >= GATHER_SECONDS):
                break
            if not said:
                print_notice(f"waiting for {most - 1 - len(present)} more host(s) at {self.settings.name}")
                said = True
            if enough is None and now - began > self.settings.timeout:
                missing = ", ".join(str(rank) for rank in range(1, most) if rank not in present)
                raise HostsMissingError(
                    f"launcher.hosts={fewest if fewest == most else f'{fewest}:{most}'}: host {missing} has not come "
                    f"in launcher.timeout={self.settings.timeout:g} s. Start the same command there with "
                    f"launcher.host_rank={missing.partition(',')[0]}"
                )
            time.sleep(INTERVAL)
        for host in present.values():
            if host.version != own_version():
                raise ConfigError(
                    f"host {host.rank}: it has version {host.version or 'unknown'} of cifar-exp, and this host "
                    f"{own_version() or 'unknown'}. Install the same version on every host"
                )
        return {place: present[rank] for place, rank in enumerate(sorted(present), 1)}

    def _compare(self, admitted: "Admitted", job: Job) -> None:
        """Let the members compose the job, and compare what they find out with what this host has."""
        place = admitted.place
        ids = {host.id: rank for rank, host in admitted.members.items()}
        news = {"overrides": job.overrides, "hosts": place.hosts, "size": place.local_size, "members": ids}
        self._server.set(f"round/{self._number}", json.dumps(news).encode())
        for rank, host in admitted.members.items():
            theirs = self._facts(admitted.store, rank, host)
            here = facts(job.settings, job.data.content_hash, job.accelerator)
            names = sorted(here.keys() | theirs.keys())
            if name := next((name for name in names if theirs.get(name) != here.get(name)), ""):
                raise ConfigError(
                    f"host {host.rank}: it differs in {name} ({theirs.get(name)} there, {here.get(name)} here). Start "
                    f"the same command with the same files on every host"
                )

    def _facts(self, store: Prefixed, place: int, host: OtherHost) -> dict[str, Any]:
        """What another host has found out after composing the job; waits for it."""
        until = time.monotonic() + self.settings.timeout
        while not store.wait([f"facts/{place}"], INTERVAL):
            if self.presence.is_lost(host):
                raise WorkerError(f"host {host.rank} is lost: it ended before the ranks were started")
            if time.monotonic() > until:
                raise MachineError(
                    f"launcher.timeout={self.settings.timeout:g}: host {host.rank} was not ready in that time. Set a "
                    f"longer one if it reads many images"
                )
        found: dict[str, Any] = json.loads(store.get(f"facts/{place}") or b"{}")
        if "refused" in found:
            raise error_of_code(int(found["code"]), f"host {host.rank}: {found['refused']}")
        return found


def facts(settings: Mapping[str, Any], content_hash: str, accelerator: str) -> dict[str, Any]:
    """What must be equal on all hosts, in JSON's types.

    Args:
        settings: those that affect the result.
        content_hash: of the images.
        accelerator: the kind of device.
    """
    found = {name: value for name, value in settings.items() if name != "data.root"}
    return found | {"the images": content_hash, "devices.accelerator": accelerator}


def _send(store: Prefixed, job: Job) -> None:
    """Send what other hosts cannot know of the job, and the checkpoint from which all resume."""
    if job.resume_from:
        folder, manifest = job.resume_from
        content = (folder / CHECKPOINTS / manifest.file).read_bytes()
        for number, start in enumerate(range(0, len(content), CHUNK)):
            store.set(f"checkpoint/{number}", content[start : start + CHUNK])
    news = {
        "plan": asdict(job.plan),
        "elapsed": job.elapsed,
        "has_unused": job.has_unused,
        "manifest": asdict(job.resume_from[1]) if job.resume_from else None,
        "is_same_run": bool(job.resume_from and job.resume_from[0] == job.run_dir),
    }
    store.set("job", json.dumps(news).encode())


def host_zero(settings: HostSettings) -> HostZero:
    """The other hosts of this command; the first call starts to listen for them.

    Raises:
        MachineError: see :class:`HostZero`.
        ConfigError: an earlier job of this command had another address.
    """
    if settings.host_rank:
        raise ConfigError(
            f"launcher.host_rank={settings.host_rank}: the number of a host is read from the command line. Type "
            f"launcher.host_rank={settings.host_rank} there"
        )
    if not opened:
        opened.append(HostZero(settings))
    if (before := opened[0].settings.name) != settings.name:
        raise ConfigError(
            f"launcher.rendezvous={settings.name}: an earlier job of this command had {before}. All jobs of a command "
            f"have the same one"
        )
    return opened[0]
