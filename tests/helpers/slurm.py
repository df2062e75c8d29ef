"""A real Slurm of two nodes on this machine, from Debian's packages, without systemd and accounting.

The partition ``low`` is preempted by ``high``: a job gets SIGTERM, and is requeued after ``GRACE`` seconds.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
NODES = ("node1", "node2")
GRACE = 60  # seconds; a job saves, and requeues itself, much earlier
PATIENCE = 120.0  # seconds

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=30
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:2 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes=node1,node2 Default=YES PriorityTier=1 GraceTime={grace}
PartitionName=high Nodes=node1,node2 PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"NOT RUN: no {absent[0]}. apt-get install slurmctld slurmd slurm-client munge"
    with suppress(ImportError):
        import submitit  # noqa: F401

        return ""
    return "NOT RUN: submitit is not installed. pip install 'cifar-exp[slurm]'"


class Cluster:
    """A running cluster.

    Attributes:
        folder: its configuration, state and logs.
        variables: the environment that its commands need.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}

    def run(self, *command: str) -> str:
        """The output of one of Slurm's commands."""
        environment = os.environ | self.variables
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=True)
        return done.stdout

    def submit(self, *options: str, command: str) -> str:
        """Submit a shell command; returns the id of its job."""
        return self.run("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={command}").strip()

    def fact(self, job: str, name: str) -> str:
        """What Slurm says about a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def jobs(self, state: str = "") -> list[str]:
        """The ids of the jobs in the queue, perhaps only of those in this state."""
        lines = self.run("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return [line.split()[0] for line in lines if state in ("", line.split()[1])]

    def preempt(self, seconds: float = 1) -> str:
        """Let a job of the other partition take both nodes; returns its id."""
        return self.submit("--partition=high", "--nodes=2", "--exclusive", command=f"sleep {seconds}")

    def start_requeued(self) -> list[str]:
        """Start the requeued jobs now: Slurm would wait for two minutes. Returns their ids."""
        started = []
        for job in self.jobs("PENDING"):
            with suppress(subprocess.CalledProcessError):  # it has just begun, or its last start is still ending
                if self.fact(job, "Restarts") != "0":
                    self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
                    started.append(job)
        return started


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster that runs inside this context."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short path, for the socket
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        cluster = Cluster(folder)
        _write(folder)
        munge = ("--key-file", "munge.key", "--socket", "munge.socket", "--pid-file", "munge.pid")
        files = [word if word.startswith("--") else str(folder / word) for word in munge]
        log = ("--log-file", str(folder / "munge.log"), "--seed-file", str(folder / "munge.seed"))
        _start(stack, cluster, "munged", "--foreground", "--force", *files, *log)
        _await(cluster, (folder / "munge.socket").exists, "munge.log")
        _start(stack, cluster, "slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for node in NODES:
            _start(stack, cluster, "slurmd", "-D", "-f", str(folder / "slurm.conf"), "-N", node)
        idle = lambda: _answer(cluster, "sinfo", "--noheader", "--partition=low", "--format=%T %D") == "idle 2"  # noqa: E731
        _await(cluster, idle, "slurmctld.log")
        stack.callback(_cancel_all, cluster)
        yield cluster


def _write(folder: Path) -> None:
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    gpus = [folder / f"gpu{number}" for number in range(2)]
    for gpu in gpus:
        gpu.touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
    host = socket.gethostname().partition(".")[0]
    text = CONFIG.format(host=host, ports=ports, user=getpass.getuser(), folder=folder, grace=GRACE)
    (folder / "slurm.conf").write_text(text)


def _start(stack: ExitStack, cluster: Cluster, program: str, *arguments: str) -> None:
    """Start a program that ends with the context."""
    place = shutil.which(program, path=PATH)
    assert place
    with (cluster.folder / f"{program}.log").open("a") as log:
        environment = os.environ | cluster.variables
        process = subprocess.Popen([place, *arguments], env=environment, stdout=log, stderr=log, start_new_session=True)
    stack.callback(_end, process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _cancel_all(cluster: Cluster) -> None:
    """Cancel all jobs and wait until they have ended."""
    if jobs := _answer(cluster, "squeue", "--noheader", "--format=%i").split():
        _answer(cluster, "scancel", *jobs)
        _await(cluster, lambda: not _answer(cluster, "squeue", "--noheader", "--format=%i"), "slurmctld.log")


def _answer(cluster: Cluster, *command: str) -> str:
    with suppress(subprocess.SubprocessError):
        return cluster.run(*command).strip()
    return "no answer"


def _await(cluster: Cluster, is_true: Callable[[], bool], log: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_true():
        if time.monotonic() > deadline:
            raise TimeoutError((cluster.folder / log).read_text()[-2000:])
        time.sleep(0.1)
