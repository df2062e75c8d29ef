"""Host 0's side of a run over several hosts: it admits the others, sends them the job, and tells them how it ended.

Its server stays open for the whole command, so that the other hosts take part in every job of a sweep. Each start of
the ranks is a *round* with a number. The others get a round's settings as text and compose them as host 0 did.
"""

import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from cifar_exp.distributed.host_place import HostPlace
from cifar_exp.distributed.host_store import Prefixed, StoreServer
from cifar_exp.errors import CifarExpError, ConfigError, MachineError, Stopped, WorkerError, error_of_code
from cifar_exp.launch.host_link import GOODBYE_SECONDS
from cifar_exp.launch.host_presence import OtherHost, Presence
from cifar_exp.launch.host_session import opened
from cifar_exp.launch.host_settings import HostSettings, interface_of
from cifar_exp.records.run_folder import CHECKPOINTS
from cifar_exp.system.own_version import own_version
from cifar_exp.system.printable import print_notice
from cifar_exp.training.plan import shared_by
from cifar_exp.worker.job import Job

CHUNK = 2**23  # bytes of a checkpoint in one message
GATHER_SECONDS = 30.0  # when enough hosts have come, how long host 0 waits for more
INTERVAL = 0.2
MOST_HOSTS = 1024


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

    def close(self, code: int) -> None:
        """Tell the other hosts that the command has ended with this exit code, and stop listening."""
        present = self.presence.hosts(MOST_HOSTS)
        self._server.set("closed", str(code).encode())
        self._server.wait([f"gone/{host.id}" for host in present.values()], GOODBYE_SECONDS)
        self._server.close()

    @contextmanager
    def round(
        self, settings: HostSettings, job: Job, is_last: bool
    ) -> Iterator[tuple[Job, Prefixed, dict[int, OtherHost]]]:
        """Gather the hosts, send them the job, and at the end tell them how it ended.

        Args:
            settings: the hosts of this run.
            job: the job for all hosts, planned for the most hosts.
            is_last: whether a failure ends the run; else there is another round.

        Yields:
            The job for this host, the store of this round, and the other hosts by their place.

        Raises:
            ConfigError, DataError: another host differs, or refuses the job.
            MachineError: not enough hosts have come in time.
            WorkerError: a host was lost before the ranks started.
        """
        members = self._gather(settings)
        self._number += 1
        self._server.forget(f"{self._number - 1}/")
        store = Prefixed(self._server, f"{self._number}/")
        hosts = len(members) + 1
        size = job.plan.world_size // settings.most
        place = HostPlace(hosts, 0, size, self._server.address, self._interface, store.prefix, self.settings.token)
        placed = replace(job, place=place, plan=shared_by(job.plan, size * hosts))
        code, message = 1, "host 0 has failed"
        try:
            self._announce(store, placed, members)
            yield placed, store, members
            code, message = 0, ""
        except (CifarExpError, Stopped) as error:
            code, message = error.exit_code, str(error)
            raise
        finally:
            again = not is_last and code == WorkerError.exit_code
            store.set("end", json.dumps({"code": code, "message": message, "again": again}).encode())
            store.wait([f"bye/{rank}" for rank in members], GOODBYE_SECONDS)

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
                raise MachineError(
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

    def _announce(self, store: Prefixed, job: Job, members: dict[int, OtherHost]) -> None:
        """Send the round to its members, compare their facts with this host's, and let them start."""
        assert job.place
        ids = {host.id: place for place, host in members.items()}
        news = {"overrides": job.overrides, "hosts": job.place.hosts, "size": job.place.local_size, "members": ids}
        self._server.set(f"round/{self._number}", json.dumps(news).encode())
        for place, host in members.items():
            theirs = self._facts(store, place, host)
            here = facts(job.settings, job.data.content_hash, job.accelerator)
            if differing := [
                name for name in sorted(here.keys() | theirs.keys()) if theirs.get(name) != here.get(name)
            ]:
                name = differing[0]
                raise ConfigError(
                    f"host {host.rank}: it differs in {name} ({theirs.get(name)} there, {here.get(name)} here). Start "
                    f"the same command with the same files on every host"
                )
        _send_checkpoint(store, job)
        sent = {
            "plan": asdict(job.plan),
            "elapsed": job.elapsed,
            "has_unused": job.has_unused,
            "manifest": asdict(job.resume_from[1]) if job.resume_from else None,
        }
        store.set("job", json.dumps(sent).encode())

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


def _send_checkpoint(store: Prefixed, job: Job) -> None:
    if job.resume_from:
        folder, manifest = job.resume_from
        content = (folder / CHECKPOINTS / manifest.file).read_bytes()
        for number, start in enumerate(range(0, len(content), CHUNK)):
            store.set(f"checkpoint/{number}", content[start : start + CHUNK])


def host_zero(settings: HostSettings) -> HostZero:
    """The other hosts of this command; the first call starts to listen for them.

    Raises:
        MachineError: see :class:`HostZero`.
        ConfigError: an earlier job of this command had another address.
    """
    if not opened:
        opened.append(HostZero(settings))
    if (before := opened[0].settings.name) != settings.name:
        raise ConfigError(
            f"launcher.rendezvous={settings.name}: an earlier job of this command had {before}. All jobs of a command "
            f"have the same one"
        )
    return opened[0]
