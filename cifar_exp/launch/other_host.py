"""The side of the other hosts: they connect to host 0 and get a job from it, again and again, until it has ended."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cifar_exp.distributed.host_place import HostPlace
from cifar_exp.distributed.host_store import Prefixed, StoreClient, TokenError, connected_client
from cifar_exp.errors import CifarExpError, MachineError, WorkerError
from cifar_exp.launch.host_link import CHUNK, ended_by_host_0
from cifar_exp.launch.host_presence import LOST_SECONDS, OtherHost, announced
from cifar_exp.launch.host_settings import TOKEN, HostSettings, interface_of
from cifar_exp.records.checkpoint import Manifest
from cifar_exp.records.run_folder import CHECKPOINTS
from cifar_exp.system.own_version import own_version
from cifar_exp.training.plan import Plan
from cifar_exp.worker.job import Job

INTERVAL = 0.5
HOST_0_LOST = "host 0 is lost: the connection to it is closed. Start the command again on every host, with resume=auto"


@dataclass(frozen=True)
class Round:
    """One start of the ranks in which this host takes part.

    Attributes:
        overrides: of the job, as host 0 has them.
        place: this host among the hosts.
        store: host 0's, for this round.
    """

    overrides: tuple[str, ...]
    place: HostPlace
    store: Prefixed

    def refuse(self, error: CifarExpError) -> None:
        """Tell host 0 why this host cannot take part."""
        refused = {"refused": str(error), "code": error.exit_code}
        self.store.set(f"facts/{self.place.host_rank}", json.dumps(refused).encode())

    def report(self, facts: dict[str, Any]) -> None:
        """Tell host 0 that this host is ready, and what it has found."""
        self.store.set(f"facts/{self.place.host_rank}", json.dumps(facts).encode())

    def wait_for_job(self) -> dict[str, Any]:
        """What only host 0 knows of the job.

        Raises:
            CifarExpError: host 0 has ended the round.
        """
        while not self.store.wait(["job"], INTERVAL):
            if (text := self.store.get("end")) is not None:
                raise ended_by_host_0(text) or WorkerError("host 0 has ended the run")
        news: dict[str, Any] = json.loads(self.store.get("job") or b"{}")
        return news

    def leave(self) -> bool:
        """Wait for the end of the round on host 0, and confirm it. Returns whether another one follows."""
        while not self.store.wait(["end"], INTERVAL):
            pass
        self.store.set(f"bye/{self.place.host_rank}", b"")
        return bool(json.loads(self.store.get("end") or b"{}")["again"])


@dataclass
class Joined:
    """The connection of another host to host 0.

    Attributes:
        settings: how host 0 is reached.
        client: the connection.
        own: how host 0 knows this host.
    """

    settings: HostSettings
    client: StoreClient
    own: OtherHost
    _number: int = 0

    def next_round(self) -> Round | None:
        """Wait for the next round in which this host takes part. None: host 0's command has ended."""
        while True:
            if self.client.wait([f"round/{self._number + 1}"], INTERVAL):
                self._number += 1
                news = json.loads(self.client.get(f"round/{self._number}") or b"{}")
                if place := news["members"].get(self.own.id):
                    return self._round(news, place)
            elif self.client.get("closed") is not None:
                return None

    @property
    def exit_code(self) -> int:
        """The exit code of host 0's command, which has ended."""
        return int(self.client.get("closed") or b"1")

    def _round(self, news: dict[str, Any], place: int) -> Round:
        store = Prefixed(self.client, f"{self._number}/")
        here = HostPlace(
            hosts=news["hosts"],
            host_rank=place,
            local_size=news["size"],
            address=self.settings.rendezvous,
            interface=interface_of(self.client.local_address),
            prefix=store.prefix,
            token=self.settings.token,
        )
        return Round(tuple(news["overrides"]), here, store)


@contextmanager
def joined(settings: HostSettings) -> Iterator[Joined]:
    """Connect to host 0, which may start later.

    Raises:
        MachineError: host 0 does not answer in time, or has another token.
        WorkerError: the connection was closed.
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
    try:
        with closing(client), announced(client, settings.host_rank, own_version()) as own:
            yield Joined(settings, client, own)
    except ConnectionError as error:
        raise WorkerError(HOST_0_LOST) from error


def with_news(job: Job, news: dict[str, Any], store: Prefixed) -> Job:
    """The job with what only host 0 knows. Its folder gets the checkpoint from which all resume."""
    origin = None
    if news["manifest"]:
        manifest = Manifest(**news["manifest"])
        source = job.run_dir if news["is_same_run"] else job.run_dir / "origin"
        origin = source, manifest
        _receive_checkpoint(store, source / CHECKPOINTS, manifest)
    elapsed = float(news["elapsed"])
    return replace(
        job,
        elapsed=elapsed,
        started=time.monotonic() - elapsed,
        has_unused=bool(news["has_unused"]),
        resume_from=origin,
    )


def plan_of(news: dict[str, Any]) -> Plan:
    """Host 0's plan."""
    fields = news["plan"]
    lists = {name: tuple(fields[name]) for name in ("learning_rates", "image_scales")}
    return Plan(**(fields | lists))


def _receive_checkpoint(store: Prefixed, folder: Path, manifest: Manifest) -> None:
    folder.mkdir(parents=True)
    path, digest = folder / Path(manifest.file).name, hashlib.sha256()
    with path.open("wb") as file:
        for number in range(-(-manifest.bytes // CHUNK)):
            part = store.get(f"checkpoint/{number}") or b""
            digest.update(part)
            file.write(part)
    if digest.hexdigest() != manifest.sha256:
        raise WorkerError("the checkpoint that host 0 has sent is not the one that it announced")
