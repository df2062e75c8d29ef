"""The set-up of one rank before it trains."""

import ctypes
import gzip
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from cifar_exp.records import journal
from cifar_exp.system.host import own_cores
from cifar_exp.worker.failure import RankFailure
from tests.conftest import TINY, Command, environment
from tests.helpers.marks import pinning


def test_failure_report_is_written_atomically(tmp_path: Path) -> None:
    """The launcher may read at any moment, and a rank may be killed while it writes."""
    failure = RankFailure(1, 0.0, None, "RuntimeError: no", "a line of a traceback\n" * 50_000)
    writer = threading.Thread(target=lambda: [failure.save(tmp_path, attempt=0) for _ in range(100)])
    writer.start()
    seen = []
    while writer.is_alive() or not seen:
        seen += RankFailure.of_attempt(tmp_path, attempt=0)
    assert set(seen) == {failure}


def test_a_profile_is_a_trace_of_six_steps(cifar_exp: Command, workplace: Path) -> None:
    done = cifar_exp(*TINY, "train.epochs=4", "train.profile=true", "hydra.run.dir=run", "tracking=none")
    assert done.returncode == 0, done.stderr
    trace = json.loads(gzip.decompress((workplace / "run" / "trace.json.gz").read_bytes()))
    steps = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep#")}
    assert len(steps) == 6


@pinning
@pytest.mark.skipif(len(own_cores()) < 2, reason="two cores are needed to have one each")
def test_ranks_that_take_all_cores_have_one_each(cifar_exp: Command, workplace: Path) -> None:
    cores = len(own_cores())
    (workplace / "spy.py").write_text(
        "import os, pathlib\nfrom cifar_exp.models.networks import convnet\n"
        "def model(*, num_classes, width, depth):\n"
        "    if 'RANK' in os.environ:\n"
        "        cores = ' '.join(map(str, os.sched_getaffinity(0)))\n"
        "        pathlib.Path(f'cores-{os.environ[\"RANK\"]}').write_text(cores)\n"
        "    return convnet(num_classes=num_classes, width=width, depth=depth)\n"
    )
    model = ("model._target_=spy.model", "trusted_modules=[spy]", "tracking=none")
    done = cifar_exp(*TINY, f"devices.count={cores}", "train.epochs=1", "train.batch_size=8", *model)
    assert done.returncode == 0, done.stderr
    pinned = sorted((workplace / f"cores-{rank}").read_text() for rank in range(cores))
    assert pinned == sorted(map(str, psutil.Process().cpu_affinity()))


def test_a_run_closes_all_files_that_it_opens(workplace: Path) -> None:
    """Python complains of each that was forgotten when it is collected, if it is told to."""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::ResourceWarning",
            "-m",
            "cifar_exp",
            *TINY,
            "tracking=none",
            "hydra.run.dir=run",
        ],
        cwd=workplace,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_freed_memory_stays_with_the_rank(cifar_exp: Command, workplace: Path) -> None:
    """A block of 40 MiB is allocated and freed twice: the second time without page faults."""
    (workplace / "spy.py").write_text(
        "import os, pathlib, resource\nfrom cifar_exp.models.networks import convnet\n"
        "def pages():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    bytearray(40 * 2**20)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "def model(*, num_classes, width, depth):\n"
        "    if 'RANK' in os.environ:\n"
        "        pathlib.Path('pages').write_text(f'{pages()} {pages()}')\n"
        "    return convnet(num_classes=num_classes, width=width, depth=depth)\n"
    )
    done = cifar_exp(*TINY, "train.epochs=1", "model._target_=spy.model", "trusted_modules=[spy]", "tracking=none")
    assert done.returncode == 0, done.stderr
    first, second = map(int, (workplace / "pages").read_text().split())
    if hasattr(ctypes.CDLL(None), "mallopt"):  # else it is the C library's affair
        assert first > 1000 > 100 > second


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile takes a C++ compiler, and this machine has none")
def test_compiling_is_counted_apart_from_the_first_step(cifar_exp: Command, workplace: Path) -> None:
    done = cifar_exp(*TINY, "train.compile=always", "hydra.run.dir=run", "tracking=none", timeout=280)
    assert done.returncode == 0, done.stderr
    last = journal.last_values(workplace / "run")
    assert last["time/train_seconds"] < last["time_split/compile"]
    assert last["test/count"] == 33
