"""After a failed rank or a stop by the user: the right exit code and status, one message, no process left."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cifar_exp.errors import Stopped
from cifar_exp.system.signals import install_signal_handlers, raise_swallowed, signals_to_answer
from tests.conftest import REPO, TINY, Command, environment, the_run
from tests.helpers.marks import linux
from tests.helpers.mlflow_runs import all_runs, client
from tests.helpers.paced import ENDLESS
from tests.helpers.processes import (
    Start,
    answers_signals,
    assert_nothing_is_left,
    training_ranks,
    wait_for,
    wait_for_tracked_runs,
)

LONG = [*ENDLESS, "devices.count=2"]


def test_a_killed_rank_ends_the_others_and_is_named(started: Start, workplace: Path) -> None:
    process = started(*LONG)
    ranks = training_ranks(process, workplace)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks) == 2
    ranks[1].kill()
    psutil.wait_procs(ranks, timeout=10)  # what is promised
    assert not ranks[0].is_running()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 7
    assert "rank 1 died without an error (killed by SIGKILL)" in errors
    assert "Traceback" not in errors
    assert_nothing_is_left(family)
    (run,) = all_runs(client())
    assert run.info.status == "FAILED"


def test_a_rank_that_raises_is_shown_once_with_its_traceback(cifar_exp: Command, workplace: Path) -> None:
    (workplace / "faulty.py").write_text(
        "import os\nfrom torch import nn\n"
        "class Faulty(nn.Linear):\n"
        "    def forward(self, images):\n"
        "        if os.environ.get('RANK') == '1':\n"
        "            raise RuntimeError('the flux capacitor is empty')\n"
        "        return super().forward(images.flatten(1))\n"
        "def model(*, num_classes, width, depth):\n"
        "    return Faulty(3072, num_classes)\n"
    )
    model = ("model._target_=faulty.model", "trusted_modules=[faulty]")
    done = cifar_exp(*TINY, "devices.count=2", *model, "progress=quiet")
    assert done.returncode == 7
    assert done.stderr.count("the flux capacitor is empty") == 2  # in the traceback's code line and its last line
    assert done.stderr.count("Traceback") == 1
    assert "rank 1 failed" in done.stderr
    (run,) = all_runs(client())
    assert run.info.status == "FAILED"


@pytest.mark.parametrize(
    ("start", "number", "code"),
    [("born", signal.SIGTERM, 143), ("started", signal.SIGINT, 130), ("started", signal.SIGHUP, 129)],
)
def test_signal_to_the_parent_ends_all_processes(
    request: pytest.FixtureRequest, workplace: Path, store: Path, start: str, number: signal.Signals, code: int
) -> None:
    process = request.getfixturevalue(start)(*LONG)
    training_ranks(process, workplace)
    wait_for_tracked_runs(process, store, 1)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert "mlflow." not in errors, "MLflow's log of what it also raises"
    assert_nothing_is_left(family)
    (run,) = all_runs(client())
    assert run.info.status == "KILLED"
    assert "stopped" in (the_run(workplace) / "progress.html").read_text()


def test_ctrl_c_in_a_terminal_reaches_the_ranks_too_and_ends_a_sweep(workplace: Path, store: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar_exp", "-m", *LONG, "seed=0,1"],
        cwd=workplace,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        training_ranks(process, workplace)
        wait_for_tracked_runs(process, store, 2)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert_nothing_is_left(family)
    runs = all_runs(client())
    assert [run.info.status for run in runs] == ["KILLED", "KILLED"]  # the first job and the parent


def test_ranks_end_when_their_parent_is_killed(born: Start, workplace: Path) -> None:
    process = born(*LONG, "tracking=none")
    ranks = training_ranks(process, workplace)
    process.kill()
    assert_nothing_is_left(ranks)


def test_non_finite_loss_is_exit_code_6(cifar_exp: Command) -> None:
    done = cifar_exp(*TINY, "devices.count=2", "optimizer.lr=1e30", "train.precision=fp32", "tracking=none")
    assert done.returncode == 6
    assert "training has diverged" in done.stderr
    assert "optimizer.lr" in done.stderr
    assert "Traceback" not in done.stderr


def test_ranks_listen_on_loopback_alone(born: Start, workplace: Path) -> None:
    process = born(*LONG, "tracking=none")
    training_ranks(process, workplace)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    listening = {c.laddr.ip for member in family for c in member.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)


def test_folder_of_a_run_is_not_used_for_another(cifar_exp: Command, workplace: Path) -> None:
    options = [*TINY, "tracking=none", "progress=quiet", "train.epochs=1", "hydra.run.dir=here"]
    assert cifar_exp(*options).returncode == 0
    journal = (workplace / "here" / "metrics.jsonl").read_text()
    again = cifar_exp(*options)
    assert again.returncode == 2
    assert "hydra.run.dir" in again.stderr
    assert (workplace / "here" / "metrics.jsonl").read_text() == journal


def test_a_folder_that_cannot_be_made_is_exit_code_8(cifar_exp: Command, workplace: Path) -> None:
    (workplace / "file").write_text("")
    done = cifar_exp(*TINY, "tracking=none", "hydra.run.dir=file/run")
    assert done.returncode == 8
    assert "hydra.run.dir" in done.stderr
    assert "Traceback" not in done.stderr


def test_sigstopped_rank_does_not_delay_the_end(started: Start, workplace: Path) -> None:
    """It only reacts to SIGKILL; elastic would wait half a minute for it."""
    process = started(*LONG, "devices.count=2", "devices.oversubscribe=true")
    training_ranks(process, workplace)[1].send_signal(signal.SIGSTOP)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=25)
    assert process.returncode == 143, errors
    assert_nothing_is_left(family)


def test_second_signal_still_closes_the_mlflow_run(born: Start, workplace: Path, store: Path) -> None:
    process = born(*LONG)
    training_ranks(process, workplace)
    wait_for_tracked_runs(process, store, 1)
    process.send_signal(signal.SIGTERM)
    assert any("a second signal ends them at once" in line for line in process.stderr)  # the first one is answered
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, "the first one counts"
    assert "Traceback" not in errors
    (run,) = all_runs(client())
    assert run.info.status == "KILLED"


@linux
@pytest.mark.parametrize("seconds", [0.4, 1.5, 3.0])
def test_ctrl_c_while_starting_is_one_line(workplace: Path, seconds: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar_exp", *LONG, "tracking=none", "progress=quiet"],
        cwd=workplace,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    wait_for(lambda: answers_signals(process.pid), process)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    on_a_fast_machine = "cifar-exp: the ranks finish their step and save; a second signal ends them at once\n"
    assert errors.removeprefix(on_a_fast_machine) == "cifar-exp: stopped by signal 2\n"


def test_signal_during_class_creation_is_recognised() -> None:
    class Field:
        def __set_name__(self, owner: type, name: str) -> None:
            raise Stopped(signal.SIGINT)

    with pytest.raises((Stopped, RuntimeError)) as raised:
        type("Made", (), {"field": Field()})
    stopped = Stopped.cause_of(raised.value)
    assert stopped
    assert stopped.exit_code == 130
    assert Stopped.cause_of(ValueError()) is None


def test_swallowed_signal_is_raised_before_ranks_start() -> None:
    before = {number: signal.getsignal(number) for number in signals_to_answer()}
    try:
        install_signal_handlers()
        raise_swallowed()  # there was none
        with suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            raise_swallowed()
        assert stopped.value.exit_code == 143
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


DELETED = """
import signal
from cifar_exp.errors import Stopped
from cifar_exp.system.signals import install_signal_handlers, raise_swallowed

class Deleted:
    def __init__(self, action): self.action = action
    def __del__(self): self.action()

install_signal_handlers()
Deleted(lambda: signal.raise_signal(signal.SIGINT))
Deleted(lambda: 1 / 0)
try:
    raise_swallowed()
except Stopped as stopped:
    print(stopped.exit_code)
"""


def test_signal_in_a_finalizer_is_reported_once_and_other_errors_are_shown() -> None:
    done = subprocess.run([sys.executable, "-c", DELETED], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "130\n"
    assert "Stopped" not in done.stderr
    assert done.stderr.count("Exception ignored") == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("command", ["train", "verify"])
def test_signal_converted_to_an_error_by_a_library_is_recognised(command: str, tmp_path: Path) -> None:
    """As omegaconf does: it catches exceptions that interrupt it and raises its own."""
    (tmp_path / "hydra").mkdir()
    (tmp_path / "hydra" / "__init__.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGTERM)\n"
        "except BaseException:\n    raise AttributeError('an attribute of None') from None\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "cifar_exp", command],
        env=environment() | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 143, done.stderr
    assert done.stderr.endswith("stopped by signal 15\n")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("sweep", [[], ["-m", "seed=0,1"]])
def test_signal_converted_to_an_error_by_an_import_is_recognised(
    cifar_exp: Command, workplace: Path, sweep: list[str]
) -> None:
    """Numpy cannot be imported again after an interrupted import; the job is not reported as failed."""
    (workplace / "interrupted.py").write_text(
        "import signal\ntry:\n    signal.raise_signal(signal.SIGTERM)\n"
        "except BaseException:\n    raise ImportError('cannot load module more than once per process') from None\n"
    )
    done = cifar_exp(*sweep, *TINY, "model._target_=interrupted.model", "trusted_modules=[interrupted]")
    assert done.returncode == 143, done.stderr
    assert done.stderr.endswith("stopped by signal 15\n")
    assert "cannot load" not in done.stderr
    assert "Traceback" not in done.stderr


FORGOTTEN = """
import multiprocessing, signal, time
from cifar_exp.launch import forkserver, rank_processes
from cifar_exp.system import host

forkserver.start_fork_server()
process = multiprocessing.get_context(host.start_method()).Process(target=time.sleep, args=(600,))
process.start()
multiprocessing.process._children.discard(process)
assert multiprocessing.active_children() == []
rank_processes.kill_ranks()
process.join(60)
assert process.exitcode == -signal.SIGKILL, process.exitcode
"""


ABANDONED = """
from multiprocessing.synchronize import Lock
import cifar_exp.launch.forkserver_preload
{}
"""


@pytest.mark.parametrize(
    ("failing", "shown"),
    [("Lock.__new__(Lock).__setstate__((0, 1, 1, '/gone'))", False), ("raise EOFError", False), ("open('gone')", True)],
)
def test_rank_is_silent_if_its_parent_ends_while_sending_the_job(failing: str, shown: bool) -> None:
    done = subprocess.run([sys.executable, "-c", ABANDONED.format(failing)], capture_output=True, text=True)
    assert done.returncode == 1
    assert ("FileNotFoundError" in done.stderr) == shown
    assert ("Traceback" in done.stderr) == shown


def test_abandoned_thread_does_not_change_the_exit_code() -> None:
    script = (
        "import atexit, threading, time\n"
        "from cifar_exp.system.process import end_process\n"
        "atexit.register(print, 'cleared up')\n"
        "class Last:\n    def __del__(self): print('the interpreter has ended')\n"
        "last = Last()\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "end_process(130)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleared up\n", "")


def test_rank_forked_just_before_the_end_is_ended_too() -> None:
    subprocess.run([sys.executable, "-c", FORGOTTEN], env=environment(), check=True, timeout=120)


def test_rank_without_launcher_ends_silently(tmp_path: Path) -> None:
    """Its failure report would be written to files that nobody removes."""
    gone = str(tmp_path / "gone")
    code = f"from pathlib import Path; from cifar_exp.worker.train_job import run_rank; run_rank(None, Path({gone!r}))"
    env = environment() | {"RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_a_last_step_that_diverges_is_exit_code_6(cifar_exp: Command) -> None:
    """The loss of the only step is from before its update; the validation after it is not finite."""
    options = ["train.batch_size=96", "train.epochs=1", "optimizer.lr=1e30", "train.precision=fp32", "tracking=none"]
    done = cifar_exp(*TINY, *options)
    assert done.returncode == 6
    assert "training has diverged" in done.stderr


def test_contradictory_settings_are_exit_code_2(cifar_exp: Command) -> None:
    done = cifar_exp(*TINY, "+optimizer.nesterov=true", "optimizer.momentum=0", "tracking=none")
    assert done.returncode == 2
    assert "Nesterov" in done.stderr
    assert "Traceback" not in done.stderr


def test_random_numbers_of_a_network_depend_on_seed_and_rank(cifar_exp: Command, workplace: Path) -> None:
    """A user's own module too: it lies in the current folder and is trusted by name."""
    (workplace / "drawing.py").write_text(
        "import os, torch\nfrom torch import nn\n"
        "class Drawing(nn.Linear):\n"
        "    def forward(self, images):\n"
        "        with open(f\"draws-{os.environ.get('RANK')}\", 'a') as file: print(torch.rand(1).item(), file=file)\n"
        "        return super().forward(images.flatten(1))\n"
        "def model(*, num_classes, width, depth):\n"
        "    return Drawing(3072, num_classes)\n"
    )
    options = ["model._target_=drawing.model", "trusted_modules=[drawing]", "tracking=none", "progress=quiet"]
    draws = []
    for _ in range(2):
        done = cifar_exp(*TINY, *options, "train.epochs=1", "devices.count=2")
        assert done.returncode == 0, done.stderr
        draws.append([(workplace / f"draws-{rank}").read_text() for rank in (0, 1)])
        for rank in (0, 1):
            (workplace / f"draws-{rank}").unlink()
    assert draws[0] == draws[1]
    assert draws[0][0] != draws[0][1]
