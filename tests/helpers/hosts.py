"""Hosts for tests: namespaces of this machine, joined by a bridge.

Each host has its own network, processes, mounts and /tmp. Hosts share no folder except this checkout and Python's. They
share the clock and the kernel.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.helpers.commands import environment

PORT = 29500
TOKEN = "a secret of this test"
# A run of two ranks without a store, in a folder with a known name.
HERE = ("train.precision=fp32", "tracking=none", "progress=quiet", "hydra.run.dir=run", "devices.count=2")
# The first process of the namespace; the command is its child, as on a real machine.
INIT = """
for hidden in /tmp $OTHERS; do mount -t tmpfs host "$hidden"; done
"$@"
code=$?
sleep 0.2
for process in /proc/[0-9]*; do tr '\\0' ' ' < "$process/cmdline"; echo; done > "$HOME/left"
exit $code
"""


def refused() -> str:
    """Why no hosts can be made here; empty if they can."""
    missing = [name for name in ("ip", "unshare", "mount") if not shutil.which(name)]
    if missing:
        return f"no {missing[0]}"
    try:
        with hosts(1, "probe"):
            return ""
    except subprocess.CalledProcessError as error:
        return f"namespaces cannot be made here: {error.stderr.decode().strip()}"


@dataclass
class Command:
    """A command on a host.

    Attributes:
        outer: the process that made the namespaces. When it is killed, the kernel kills all processes of the host.
        folder: of the host.
    """

    outer: subprocess.Popen[str]
    folder: Path

    @property
    def processes(self) -> list[psutil.Process]:
        """All processes of the host."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.outer.pid).children(recursive=True)
        return []

    @property
    def main(self) -> psutil.Process:
        """The process of the command."""
        return next(process for process in self.processes if "cifar_exp" in str(process.cmdline()[1:3]))

    @property
    def left_behind(self) -> list[str]:
        """The command lines of Python processes that lived on after the command had ended."""
        lines = (self.folder / "left").read_text().splitlines()
        return [line for line in lines if "python" in line.partition(" ")[0]]

    def signal(self, number: int) -> None:
        """Send a signal to the command alone."""
        self.main.send_signal(number)

    def kill(self) -> None:
        """End the host: none of its processes can do anything any more."""
        self.outer.kill()
        self.outer.wait()

    def ended(self, seconds: float = 200) -> tuple[int, str]:
        """Wait for the command to end. Returns its exit code and its stderr."""
        _, errors = self.outer.communicate(timeout=seconds)
        return self.outer.returncode, errors


@dataclass
class Host:
    """One host.

    Attributes:
        name: of its network namespace.
        rank: launcher.host_rank.
        folder: where its commands start.
        others: the folders of the other hosts, which it does not see.
    """

    name: str
    rank: int
    folder: Path
    others: Sequence[Path]
    commands: list[Command] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Its address on the bridge."""
        return f"10.77.0.{self.rank + 1}"

    def start(self, *words: str, hosts: object = 2, token: str = TOKEN, cores: Sequence[int] = ()) -> Command:
        """Run ``cifar-exp`` with these words and this host's place among ``hosts``."""
        place = [f"launcher.host_rank={self.rank}", f"launcher.hosts={hosts}", f"launcher.rendezvous=10.77.0.1:{PORT}"]
        bound = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
        command = [*bound, sys.executable, "-m", "cifar_exp", *words, *place]
        inside = ["ip", "netns", "exec", self.name, "sh", "-c", INIT, "sh", *command]
        words_ = ["unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", *inside]
        variables = environment() | {"CIFAR_EXP_TOKEN": token, "HOME": str(self.folder), "TMPDIR": "/tmp"}
        variables["OTHERS"] = " ".join(map(str, self.others))
        started = subprocess.Popen(
            words_, cwd=self.folder, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.commands.append(Command(started, self.folder))
        return self.commands[-1]

    def cut(self) -> None:
        """Cut the host's cable."""
        _run("ip", "-n", self.name, "link", "set", "eth0", "down")

    def join(self) -> None:
        """Mend the cable."""
        _run("ip", "-n", self.name, "link", "set", "eth0", "up")

    def slow_down(self, *netem: str) -> None:
        """Delay or limit what the host sends, as ``tc netem`` takes it: ``delay 1ms``, ``rate 100mbit``."""
        _run("ip", "netns", "exec", self.name, "tc", "qdisc", "replace", "dev", "eth0", "root", "netem", *netem)


@contextmanager
def hosts(count: int, name: str = "") -> Iterator[list[Host]]:
    """Make ``count`` hosts. At the end, their processes and namespaces are gone.

    Raises:
        subprocess.CalledProcessError: this machine allows no namespaces.
    """
    base = f"cx{os.getpid()}{name}"
    names = [f"{base}-{rank}" for rank in range(count)]
    made, made_hosts = [], list[Host]()
    folders = [Path(_made_folder(base, rank)) for rank in range(count)]
    try:
        for each in (switch := f"{base}-s", *names):
            _run("ip", "netns", "add", each)
            made.append(each)
            _run("ip", "-n", each, "link", "set", "lo", "up")
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        for rank, each in enumerate(names):
            end = ("peer", "name", f"port{rank}", "netns", switch)
            _run("ip", "-n", each, "link", "add", "eth0", "type", "veth", *end)
            _run("ip", "-n", each, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", "eth0")
            _run("ip", "-n", each, "link", "set", "eth0", "up")
            _run("ip", "-n", switch, "link", "set", f"port{rank}", "master", "br0", "up")
        made_hosts += [
            Host(each, rank, folders[rank], [folder for folder in folders if folder != folders[rank]])
            for rank, each in enumerate(names)
        ]
        yield made_hosts
    finally:
        for command in (command for host in made_hosts for command in host.commands):
            if command.outer.poll() is None:
                command.kill()
        for each in made:
            subprocess.run(["ip", "netns", "del", each], check=False)
        shutil.rmtree(folders[0].parent, ignore_errors=True)


def _made_folder(base: str, rank: int) -> str:
    """A folder outside /tmp, which each host has for itself."""
    folder = Path("/var/tmp") / base / str(rank)
    folder.mkdir(parents=True)
    return str(folder)


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def steps(host: Host) -> int:
    """Lines of the journal."""
    journal = host.folder / "run" / "metrics.jsonl"
    return len(journal.read_text().splitlines()) if journal.exists() else 0


def wait_for(condition: Callable[[], object], *commands: Command) -> None:
    """Poll until the condition holds, while all commands run."""
    deadline = time.monotonic() + 150
    while not condition():
        for command in commands:
            assert command.outer.poll() is None, command.ended()
        assert time.monotonic() < deadline
        time.sleep(0.1)
