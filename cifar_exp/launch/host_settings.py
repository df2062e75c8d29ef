"""The settings of a run over several hosts, and the secret with which hosts prove that they belong together."""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cifar_exp.errors import ConfigError, MachineError

TOKEN = "CIFAR_EXP_TOKEN"


@dataclass(frozen=True)
class HostSettings:
    """The settings of a run over several hosts, checked.

    Attributes:
        fewest: the run needs at least so many hosts.
        most: the run takes at most so many hosts.
        host_rank: the number of this one, from 0.
        rendezvous: host and port of host 0.
        timeout: seconds that hosts wait for each other.
        token: the secret that all hosts know.
    """

    fewest: int
    most: int
    host_rank: int
    rendezvous: tuple[str, int]
    timeout: float
    token: bytes = field(repr=False)

    @property
    def name(self) -> str:
        """The rendezvous as it is typed."""
        return f"{self.rendezvous[0]}:{self.rendezvous[1]}"


def host_range(hosts: int | str | None) -> tuple[int, int]:
    """The fewest and the most hosts of ``launcher.hosts``, which is ``2`` or ``1:2``. The schema has checked its form.

    Raises:
        ConfigError: the first number is larger than the second.
    """
    fewest, _, most = str(hosts or 1).partition(":")
    if int(fewest) > int(most or fewest):
        raise ConfigError(f"launcher.hosts={hosts}: the fewest come first. Set launcher.hosts={most}:{fewest}")
    return int(fewest), int(most or fewest)


def host_settings(
    hosts: int | str,
    host_rank: int,
    rendezvous: str | None,
    token_file: str | None,
    timeout: float,
    are_hosts_known: bool,
) -> HostSettings:
    """Check the settings of ``launcher`` for several hosts.

    Raises:
        ConfigError: they do not fit together, or there is no token.
    """
    fewest, most = host_range(hosts)
    if not are_hosts_known:  # the number of hosts is an axis of the sweep
        most = max(most, host_rank + 1)
    if not 0 <= host_rank < most:
        raise ConfigError(f"launcher.host_rank={host_rank}: with launcher.hosts={hosts} it is 0 to {most - 1}")
    name, _, port = (rendezvous or "").rpartition(":")
    if not name or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"launcher.rendezvous={rendezvous}: with launcher.hosts={hosts} it is the address of host 0 as the other "
            f"hosts reach it, and a free port. Set launcher.rendezvous=<host 0>:29500"
        )
    return HostSettings(fewest, most, host_rank, (name.strip("[]"), int(port)), timeout, _token(token_file))


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


def interface_of(address: str) -> str:
    """The name of the network interface that has this IP address.

    Raises:
        MachineError: none has it.
    """
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    raise MachineError(
        f"launcher.rendezvous: {address} is no address of a network interface of this host. Set it to one of host 0"
    )
