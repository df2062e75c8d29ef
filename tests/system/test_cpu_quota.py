"""A container's CPU quota counts as cores, whichever version of control groups it is set in."""

from pathlib import Path

import pytest

from cifar_exp.config.schema import Devices
from cifar_exp.errors import MachineError
from cifar_exp.launch.devices import find_devices
from cifar_exp.system import host
from cifar_exp.system.cpu_quota import cpu_quota, throttled_seconds, usable_cores
from cifar_exp.system.machine import description

V2 = "26 23 0:23 {root} {mount} rw,nosuid shared:4 - cgroup2 cgroup rw,nsdelegate"
V1 = "32 31 0:28 {root} {mount} rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"
OTHERS = "33 31 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n22 1 8:1 / / rw - ext4 /dev/vda rw\n"


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with a file system of control groups. The process has four cores."""
    monkeypatch.setattr(host, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host, "own_cores", lambda: [0, 1, 2, 3])
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def grouped(place: Path, groups: str, mount: str, root: str, files: dict[str, str]) -> None:
    (place / "proc/self/cgroup").write_text(groups)
    folder = place / "control groups"
    line = mount.format(root=root, mount=str(folder).replace(" ", "\\040"))
    (place / "proc/self/mountinfo").write_text(f"{OTHERS}{line}\n")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")


V1_ONE = {"cpu.cfs_quota_us": "100000", "cpu.cfs_period_us": "100000"}
CASES = {
    "v2, in a container": ("0::/", V2, "/", {"cpu.max": "200000 100000"}, 2.0),
    "v2, set above": ("0::/a/b", V2, "/", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
    "v2, the lowest counts": ("0::/a", V2, "/", {"cpu.max": "300000 100000", "a/cpu.max": "50000 100000"}, 0.5),
    "v2, none": ("0::/a", V2, "/", {"a/cpu.max": "max 100000"}, None),
    "v2, seen from outside": ("0::/../other", V2, "/", {"cpu.max": "100000 100000"}, 1.0),
    "v1": ("5:memory:/m\n4:cpu,cpuacct:/a", V1, "/", {f"a/{name}": text for name, text in V1_ONE.items()}, 1.0),
    "v1, as in Docker": ("4:cpu,cpuacct:/docker/1f", V1, "/docker/1f", V1_ONE, 1.0),
    "v1, named otherwise inside": ("4:cpu,cpuacct:/docker/1f", V1, "/kubepods", V1_ONE, 1.0),
    "v1, none": ("4:cpu,cpuacct:/", V1, "/", {**V1_ONE, "cpu.cfs_quota_us": "-1"}, None),
    "neither": ("", V1, "/", {}, None),
    "not a number": ("0::/", V2, "/", {"cpu.max": "much of it"}, None),
}


@pytest.mark.parametrize(("groups", "mount", "root", "files", "quota"), CASES.values(), ids=CASES)
def test_the_quota_is_read(
    place: Path, groups: str, mount: str, root: str, files: dict[str, str], quota: float | None
) -> None:
    grouped(place, groups, mount, root, files)
    assert cpu_quota() == quota
    assert usable_cores() == (4 if quota is None else max(1, int(quota)))


def test_a_run_takes_no_more_cores_than_the_quota(place: Path) -> None:
    grouped(place, "0::/", V2, "/", {"cpu.max": "250000 100000"})
    found = find_devices(Devices(accelerator="cpu", count="auto", threads="auto", oversubscribe=False))
    assert (found.world_size, found.threads, found.found) == (1, 2, 2)
    assert description("cpu", 1)["machine.cores"] == "2"
    with pytest.raises(MachineError, match=r"requested 3 cores, found 2 \(the container has a CPU quota of 2.5\)"):
        find_devices(Devices(accelerator="cpu", count=3, threads="auto", oversubscribe=False))


@pytest.mark.parametrize(
    ("groups", "mount", "stat"),
    [
        ("0::/", V2, "usage_usec 9\nthrottled_usec 2500000"),
        ("4:cpu,cpuacct:/", V1, "nr_periods 3\nthrottled_time 2500000000"),
    ],
)
def test_time_throttled_by_the_quota_is_measured(place: Path, groups: str, mount: str, stat: str) -> None:
    grouped(place, groups, mount, "/", {"cpu.stat": stat})
    assert throttled_seconds() == 2.5
