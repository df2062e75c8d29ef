"""Where the ranks of one host stand among the ranks of all hosts."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class HostPlace:
    """One host of a run over several hosts.

    Attributes:
        hosts: number of hosts.
        host_rank: the number of this one, from 0. Rank 0 of the run is on host 0.
        local_size: ranks of each host.
        address: where host 0's store listens: host and port.
        interface: the network interface that leads there, such as ``eth0``.
        prefix: of the keys of these ranks in the store.
        token: the secret that all hosts know.
    """

    hosts: int
    host_rank: int
    local_size: int
    address: tuple[str, int]
    interface: str
    prefix: str
    token: bytes = field(repr=False)

    @property
    def first_rank(self) -> int:
        """The first rank of this host."""
        return self.host_rank * self.local_size
