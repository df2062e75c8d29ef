"""How the hosts of one run meet: settings, token, and what host 0 tells the others before the ranks start.

Nothing is pickled. Each host composes the same command, so that only what the command cannot know travels.
"""

import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from cifar_exp.distributed.host_place import HostPlace
from cifar_exp.distributed.host_store import StoreClient, StoreServer, TokenError, connected_client
from cifar_exp.errors import CifarExpError, ConfigError, MachineError, Stopped
from cifar_exp.launch.host_link import LOST_SECONDS, HostLink
from cifar_exp.records.checkpoint import Manifest
from cifar_exp.records.run_folder import CHECKPOINTS
from cifar_exp.system.own_version import own_version
from cifar_exp.training.plan import Plan
from cifar_exp.worker.job import Job

TOKEN = "CIFAR_EXP_TOKEN"
CHUNK = 2**23  # bytes of a checkpoint in one message


@dataclass(frozen=True)
class HostSettings:
    """The settings of a run over several hosts, checked.

    Attributes:
        hosts: number of hosts.
        host_rank: the number of this one.
        rendezvous: host and port of host 0.
        token: the secret that all hosts know.
        timeout: seconds that hosts wait for each other.
    """

    hosts: int
    host_rank: int
    rendezvous: tuple[str, int]
    timeout: float
    token: bytes = field(repr=False)

    @property
    def name(self) -> str:
        """The rendezvous as it is typed."""
        return f"{self.rendezvous[0]}:{self.rendezvous[1]}"


def host_settings(
    hosts: int, host_rank: int, rendezvous: str | None, token_file: str | None, timeout: float
) -> HostSettings:
    """Check the settings of ``launcher`` for several hosts.

    Raises:
        ConfigError: they do not fit together, or there is no token.
    """
    if not 0 <= host_rank < hosts:
        raise ConfigError(f"launcher.host_rank={host_rank}: with launcher.hosts={hosts} it is 0 to {hosts - 1}")
    name, _, port = (rendezvous or "").rpartition(":")
    if not name or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"launcher.rendezvous={rendezvous}: with launcher.hosts={hosts} it is the address of host 0 as the other "
            f"hosts reach it, and a free port. Set launcher.rendezvous=<host 0>:29500"
        )
    return HostSettings(hosts, host_rank, (name.strip("[]"), int(port)), timeout, _token(token_file))


def _token(file: str | None) -> bytes:
    if not file:
        token = os.environ.get(TOKEN, "").strip().encode()
        if not token:
            raise ConfigError(
                f"{TOKEN}: the hosts of a run prove with a secret that they belong together. Set this variable to the "
                f"same random text on every host, or launcher.token_file=<a file with it, of mode 0600>"
            )
        return token
    path = Path(file)
    try:
        mode = path.stat().st_mode
        token = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"launcher.token_file={file}: it cannot be read: {error.strerror}") from error
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(f"launcher.token_file={file}: others can read it. Run chmod 600 {file}")
    if not token:
        raise ConfigError(f"launcher.token_file={file}: it is empty. Write a random text into it")
    return token


@contextmanager
def host_zero(settings: HostSettings, job: Job, warn: Callable[[str], None]) -> Iterator[tuple[Job, StoreServer]]:
    """Host 0's side: wait for the other hosts, tell them about the job, and at the end tell them how it ended.

    Raises:
        ConfigError, DataError: another host differs.
        MachineError: the address is not this host's, or not all hosts have come in time.
    """
    try:
        address = socket.getaddrinfo(*settings.rendezvous, type=socket.SOCK_STREAM)[0][4]
        server = StoreServer((str(address[0]), int(address[1])), settings.token)
    except OSError as error:
        raise MachineError(
            f"launcher.rendezvous={settings.name}: host 0 cannot listen there: {error.strerror or error}. Set it to an "
            f"address of this host and a free port"
        ) from error
    with closing(server):
        size = job.plan.world_size // settings.hosts
        place = HostPlace(settings.hosts, 0, size, settings.rendezvous, interface_of(str(address[0])), settings.token)
        placed = replace(job, place=place)
        code, message = 1, "host 0 has failed"
        try:
            _admit(server, placed, settings, warn)
            yield placed, server
            code, message = 0, ""
        except (CifarExpError, Stopped) as error:
            code, message = error.exit_code, str(error)
            raise
        finally:
            HostLink(place, server, Path()).end(code, message)


def facts(job: Job) -> dict[str, Any]:
    """What must be equal on all hosts."""
    assert job.place
    return {
        "version of cifar_exp": own_version(),
        "launcher.hosts": job.place.hosts,
        "settings that affect the result": job.config_hash,
        "images": job.data.content_hash,
        "ranks per host": job.place.local_size,
        "accelerator": job.accelerator,
        "precision": job.train.precision,
    }


def _admit(server: StoreServer, job: Job, settings: HostSettings, warn: Callable[[str], None]) -> None:
    """Wait until every host has come, compare its facts, and send the job."""
    others = range(1, settings.hosts)
    until = time.monotonic() + settings.timeout
    warn(f"waiting for {settings.hosts - 1} more host(s) at {settings.name}")
    for rank in others:
        if not server.wait([f"hello/{rank}"], max(0.0, until - time.monotonic())):
            raise MachineError(
                f"launcher.hosts={settings.hosts}: host {rank} has not come in launcher.timeout="
                f"{settings.timeout:g} s. Start the same command there with launcher.host_rank={rank}"
            )
        theirs = json.loads(server.get(f"hello/{rank}") or b"{}")
        differing = [name for name, value in facts(job).items() if theirs.get(name) != value]
        if differing:
            name = differing[0]
            raise ConfigError(
                f"host {rank}: it differs in {name} ({theirs.get(name)} there, {facts(job)[name]} here). Start the "
                f"same command with the same version and the same images on every host"
            )
    _send_checkpoint(server, job)
    news = {
        "global_batch_size": job.plan.global_batch_size,
        "elapsed": job.elapsed,
        "has_unused": job.has_unused,
        "manifest": asdict(job.resume_from[1]) if job.resume_from else None,
    }
    server.set("job", json.dumps(news).encode())


def _send_checkpoint(server: StoreServer, job: Job) -> None:
    if job.resume_from:
        folder, manifest = job.resume_from
        content = (folder / CHECKPOINTS / manifest.file).read_bytes()
        for number, start in enumerate(range(0, len(content), CHUNK)):
            server.set(f"checkpoint/{number}", content[start : start + CHUNK])


@contextmanager
def joined(settings: HostSettings, size: int) -> Iterator[tuple[HostPlace, StoreClient]]:
    """Another host's side: connect to host 0.

    Raises:
        MachineError: host 0 does not answer in time, or has another token.
    """
    try:
        client = connected_client(settings.rendezvous, settings.token, settings.timeout, LOST_SECONDS)
    except TokenError as error:
        raise MachineError(
            f"launcher.rendezvous={settings.name}: host 0 has another token. Set the same {TOKEN} or "
            f"launcher.token_file on every host"
        ) from error
    except OSError as error:
        raise MachineError(
            f"launcher.rendezvous={settings.name}: host 0 has not answered in {settings.timeout:g} s: "
            f"{error.strerror or error}. Start the same command there with launcher.host_rank=0"
        ) from error
    with closing(client):
        interface = interface_of(client.local_address)
        yield (
            HostPlace(settings.hosts, settings.host_rank, size, settings.rendezvous, interface, settings.token),
            client,
        )


def greeted(client: StoreClient, job: Job, timeout: float, plan_of_batch: Callable[[int], Plan]) -> Job:
    """Tell host 0 that this host is ready. Returns the job with what only host 0 knows.

    Args:
        client: the connection to host 0.
        job: the job that this host has made of the same command; its folder gets the checkpoint.
        timeout: seconds to wait for host 0.
        plan_of_batch: the plan with this global batch; a resumed run keeps its checkpoint's.

    Raises:
        CifarExpError: host 0 has ended the run, or does not start it in time.
    """
    assert job.place
    client.set(f"hello/{job.place.host_rank}", json.dumps(facts(job)).encode())
    until = time.monotonic() + timeout
    link = HostLink(job.place, client, Path())
    while not client.wait(["job"], 0.5):
        if ended := link.ended_by_host_0():
            raise ended
        client.add(f"looks/{job.place.host_rank}", 1)
        if time.monotonic() > until:
            raise MachineError(f"launcher.timeout={timeout:g}: host 0 has not started the ranks in that time")
    news = json.loads(client.get("job") or b"{}")
    origin = None
    if news["manifest"]:
        manifest = Manifest(**news["manifest"])
        origin = job.run_dir, manifest
        _receive_checkpoint(client, job.run_dir / CHECKPOINTS, manifest)
    elapsed = float(news["elapsed"])
    return replace(
        job,
        plan=plan_of_batch(int(news["global_batch_size"])),
        elapsed=elapsed,
        started=job.started - elapsed,
        has_unused=bool(news["has_unused"]),
        resume_from=origin,
    )


def _receive_checkpoint(client: StoreClient, folder: Path, manifest: Manifest) -> None:
    folder.mkdir(parents=True)
    with (folder / Path(manifest.file).name).open("wb") as file:
        for number in range(-(-manifest.bytes // CHUNK)):
            file.write(client.get(f"checkpoint/{number}") or b"")


def interface_of(address: str) -> str:
    """The name of the network interface that has this IP address.

    Raises:
        MachineError: none has it.
    """
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    raise MachineError(f"{address}: no network interface of this host has this address. Set launcher.rendezvous to one")
