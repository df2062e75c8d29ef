"""Preempt the jobs of a sweep on a real Slurm at random moments, and compare their weights with those of a local sweep.

    python benchmarks/slurm_preemption.py --images my-images --times 5

Four jobs run at the same time on the two nodes that this program starts (see tests/helpers/slurm.py). Every preemption
hits all of them: Slurm sends SIGTERM, they save and requeue themselves. Most preemptions come while all jobs train;
every third one comes at a random moment of their start.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from operator import gt
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cifar_exp.records import checkpoint
from tests.helpers.slurm import Cluster, missing, running_cluster

JOBS = 4
STARTING_SECONDS = 20.0


def main() -> int:
    """Run both sweeps; 0 if all weights are equal, bit for bit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="class folders; otherwise synthetic images")
    parser.add_argument("--times", type=int, default=5, help="preemptions of each job")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the cluster is ended first
    if reason := missing():
        print(reason)
        return 1
    folder = Path(tempfile.mkdtemp(prefix="slurm-preemption-"))
    data = ["data=folders", f"data.root={Path(chosen.images).resolve()}"] if chosen.images else ["data=synthetic"]
    settings = [*data, f"train.epochs={chosen.epochs}", "train.batch_size=100", "model.width=8", "model.depth=1"]
    settings += ["devices=cpu", "devices.count=1", "train.precision=fp32", "train.deterministic=true"]
    settings += ["tracking=none", f"seed={','.join(map(str, range(JOBS)))}"]
    with running_cluster() as cluster, ExitStack() as stack:
        command = ["hydra/launcher=slurm", "hydra.launcher.partition=low", "hydra.sweep.dir=slurm", *settings]
        process = _started(folder, cluster, command)
        stack.callback(process.terminate)
        hits = _preempt(cluster, process, folder / "slurm", chosen.times, random.Random(chosen.seed))
        code = process.wait()
    print(f"preempted {hits} times; the sweep's exit code is {code}", flush=True)
    with ExitStack() as stack:
        local = _started(folder, None, ["hydra.sweep.dir=local", "progress=quiet", *settings])
        stack.callback(local.terminate)
        local.wait()
    equal = [_equal(folder / "slurm" / str(job), folder / "local" / str(job)) for job in range(JOBS)]
    print(f"equal weights: {sum(equal)} of {JOBS} jobs", flush=True)
    if all(equal) and code == 0:
        shutil.rmtree(folder)
        return 0
    print(f"see {folder}")
    return 1


def _started(folder: Path, cluster: Cluster | None, arguments: list[str]) -> "subprocess.Popen[bytes]":
    environment = os.environ | (cluster.variables if cluster else {})
    return subprocess.Popen([sys.executable, "-m", "cifar_exp", "-m", *arguments], cwd=folder, env=environment)


def _preempt(cluster: Cluster, process: "subprocess.Popen[bytes]", sweep: Path, times: int, rng: random.Random) -> int:
    """Preempt all jobs ``times`` times. Returns the number of jobs that were hit, over all preemptions."""
    hits = 0
    for number in range(times):
        before = _lines(sweep)
        while number % 3 < 2 and process.poll() is None and not all(map(gt, _lines(sweep), before)):
            time.sleep(0.2)
        time.sleep(rng.uniform(0, 3 if number % 3 < 2 else STARTING_SECONDS))
        running = cluster.jobs("RUNNING")
        cluster.preempt()
        while process.poll() is None and set(running) & set(cluster.jobs("RUNNING")):
            time.sleep(0.2)
        hits += len(running)
        print(f"{number}: jobs {' '.join(running)}; journals of {_lines(sweep)} lines", flush=True)
        requeued: set[str] = set()
        while process.poll() is None and len(requeued) < len(running):
            requeued |= set(cluster.start_requeued())
            time.sleep(0.2)
    return hits


def _lines(sweep: Path) -> list[int]:
    """The number of lines in the journal of each job: it grows with each epoch."""
    paths = [sweep / str(job) / "metrics.jsonl" for job in range(JOBS)]
    return [path.read_text().count("\n") if path.exists() else 0 for path in paths]


def _equal(one: Path, other: Path) -> bool:
    weights = [dict(checkpoint.newest(run_dir, print).model) for run_dir in (one, other)]
    return all(bool((value == weights[1][name]).all()) for name, value in weights[0].items())


if __name__ == "__main__":
    sys.exit(main())
