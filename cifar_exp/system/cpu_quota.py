"""The CPU quota of a container: the CPU time that its processes may use, in cores.

``docker run --cpus=1`` and Kubernetes' limits leave all cores visible and stop the container's processes when they have
used their time. So more threads than the quota stop each other.

A quota is a setting of a control group: ``cpu.max`` (cgroup v2), or ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us``
(v1). The groups above a process's own limit it, too.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from cifar_exp.system import host


def usable_cores() -> int:
    """How many threads of this process can run all the time: its cores, or fewer under a quota; at least one.

    A quota is rounded down. With 1.5 cores, two threads would be throttled a quarter of the time.
    """
    quota = cpu_quota()
    cores = len(host.own_cores())
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota() -> float | None:
    """The number of cores that the quota amounts to; None without one."""
    quotas = [quota for folder in _groups() if (quota := _quota_of(folder)) is not None]
    return min(quotas, default=None)


def throttled_seconds() -> float | None:
    """Seconds for which a quota has stopped this process's group so far; None if the system does not count them."""
    for folder in _groups():
        for line in host.content(folder / "cpu.stat").splitlines():
            name, _, value = line.partition(" ")
            if name in ("throttled_usec", "throttled_time"):  # v1 counts nanoseconds
                return int(value) / (1e6 if name == "throttled_usec" else 1e9)
    return None


def _quota_of(folder: Path) -> float | None:
    """The quota of one group, in cores. ``max`` and -1 mean none."""
    limit, _, period = host.content(folder / "cpu.max").partition(" ")
    if not limit:
        limit, period = (host.content(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    with suppress(ValueError, ZeroDivisionError):
        quota = int(limit) / int(period or "100000")
        return quota if quota > 0 else None
    return None


def _groups() -> Iterator[Path]:
    """The folders of the control groups that this process is in, each followed by those above it.

    ``/proc/self/cgroup`` names the process's group, and ``/proc/self/mountinfo`` which part of the groups is mounted
    where. In a container the group may have a name outside the mounted part; the mounted folder is its own group then.
    """
    own = {}  # "" for v2, "cpu" for v1 -> the process's group
    for line in host.control_groups():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" or "cpu" in controllers.split(","):
            own["" if number == "0" else "cpu"] = path
    for line in host.mounts():
        mount, _, system = line.partition(" - ")
        kind, _, options = system.partition(" ")
        version = {"cgroup2": "", "cgroup": "cpu"}.get(kind)
        if version not in own or (kind == "cgroup" and "cpu" not in options.split(" ")[-1].split(",")):
            continue
        root, folder = mount.split(" ")[3:5]
        place = Path(folder.encode().decode("unicode_escape"))  # a space is \040
        inside = PurePosixPath(own[version])
        below = inside.relative_to(root) if inside.is_relative_to(root) else PurePosixPath()
        if ".." in below.parts:  # a group outside the mounted part
            below = PurePosixPath()
        yield from (place / part for part in (below, *below.parents))
