"""Only one module depends on the platform: its results on Linux, and without Linux's calls and files."""

import ast
import ctypes
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from cifar_exp.system import host
from cifar_exp.system.cpu_quota import cpu_quota, throttled_seconds
from cifar_exp.system.locks import Owner
from cifar_exp.system.supported import misstarted
from tests.conftest import REPO, environment
from tests.helpers.marks import linux

PACKAGE = sorted([*(REPO / "cifar_exp").glob("**/*.py"), *(REPO / "hydra_plugins").glob("**/*.py")])
MODULES = ("cifar_exp", "cifar_exp.cli.entry", "cifar_exp.cli.main")
PARTS = sorted({f"cifar_exp.cli.{path.stem}" for path in (REPO / "cifar_exp/cli").glob("[a-z]*.py")} - set(MODULES))
FORBIDDEN_FILES = ("/proc", "/sys/", "/dev/shm", "/etc/machine-id")
FORBIDDEN_NAMES = {
    *("sys.platform", "os.name", "os.uname", "platform.system", "time.CLOCK_BOOTTIME"),
    *("host.MACOS", "host.PROC", "host.SYS"),
}
FORBIDDEN_WORDS = {"darwin", "win32", "linux", "prctl", "fork", "lo", "lo0"}


def platform_questions(source: str) -> list[str]:
    """What a module asks of the platform by itself: attributes of its names, files, words that are used as values."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if name in FORBIDDEN_NAMES or name.lower().startswith("os.sched_"):
                found.append(name)
        if isinstance(node, ast.ImportFrom) and node.module == "cifar_exp.system.host":
            found += [name for alias in node.names if (name := f"host.{alias.name}") in FORBIDDEN_NAMES]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            value = node.value
            if value.startswith(FORBIDDEN_FILES) or value.endswith((".so", ".dylib")) or value in FORBIDDEN_WORDS:
                found.append(value)
    return found


def test_only_host_module_checks_the_platform() -> None:
    questions = {
        path.name: platform_questions(path.read_text())
        for path in PACKAGE
        if path.name not in ("host.py", "supported.py")
    }
    assert {name: found for name, found in questions.items() if found} == {}
    assert platform_questions((REPO / "cifar_exp/system/host.py").read_text())
    assert platform_questions("from cifar_exp.system.host import MACOS\nhost.PROC") == ["host.MACOS", "host.PROC"]


@linux
def test_lock_file_of_an_earlier_version_is_read() -> None:
    """It has the process's start time in kernel ticks."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    assert host.process_started(os.getpid()) == fields[19]
    assert Owner.here().boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.fixture
def no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither ``/proc`` nor ``/sys``."""
    for name in ("PROC", "SYS", "MACHINE_ID"):
        monkeypatch.setattr(host, name, tmp_path / "none")


@pytest.fixture
def sysctl(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, bytes]:
    """What macOS says under its names."""
    stored: dict[bytes, bytes] = {}

    def ask(name: bytes, value: Any, size: Any, new: None, new_size: ctypes.c_size_t) -> int:
        assert (size._obj.value, new, new_size.value) == (256, None, 0)
        if name in stored:
            value.value = stored[name]
        return 0 if name in stored else -1

    monkeypatch.setattr(host, "c_function", lambda name: ask if name == "sysctlbyname" else None)
    return stored


@pytest.mark.usefixtures("no_files")
def test_without_proc_a_process_is_known_by_when_it_was_created(sysctl: dict[bytes, bytes]) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = host.process_started(child.pid)
    assert float(started) == pytest.approx(psutil.Process(child.pid).create_time(), abs=0.01)
    theirs = Owner(Owner.here().host, "a boot", "", child.pid, started)
    assert not theirs.is_gone()  # nothing tells one boot from another
    sysctl[b"kern.bootsessionuuid"] = b"a boot"
    assert not theirs.is_gone()
    child.kill()
    child.wait()
    assert theirs.is_gone()
    assert host.process_started(child.pid) == ""
    sysctl[b"kern.bootsessionuuid"] = b"another boot"
    assert Owner(theirs.host, "a boot", "", os.getpid(), host.process_started(os.getpid())).is_gone()


@pytest.mark.usefixtures("no_files")
def test_unknown_facts_are_omitted_without_proc_and_sys(sysctl: dict[bytes, bytes]) -> None:
    assert host.processor()
    sysctl[b"machdep.cpu.brand_string"] = b"Apple M0"
    assert host.processor() == "Apple M0"
    assert (throttled_seconds(), cpu_quota(), host.thermal_events()) == (None, None, None)
    assert (host.machine_id(), host.pid_namespace(), host.gpus_of_the_driver()) == ("", "", [])
    assert host.multiplies_bfloat16() is False


def test_files_of_linux_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "PROC", tmp_path)
    monkeypatch.setattr(host, "SYS", tmp_path)
    monkeypatch.setattr(host, "own_cores", lambda: [0, 1, 2])
    (tmp_path / "cpuinfo").write_text("model name\t: Some CPU @ 3 GHz\nflags\t\t: fpu avx512_bf16 sse\n")
    for core, count in ((0, 3), (1, 4)):
        folder = tmp_path / f"devices/system/cpu/cpu{core}/thermal_throttle"
        folder.mkdir(parents=True)
        (folder / "core_throttle_count").write_text(f"{count}\n")
    (tmp_path / "driver/nvidia/gpus/0").mkdir(parents=True)
    (tmp_path / "driver/nvidia/gpus/0/information").write_text("Model: \t\t NVIDIA H100\nIRQ: 1\n")
    assert host.processor() == "Some CPU @ 3 GHz"
    assert host.multiplies_bfloat16() is True
    assert host.thermal_events() == 7
    assert host.gpus_of_the_driver() == ["NVIDIA H100"]


def test_all_cores_are_used_and_none_pinned_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in dir(os) if name.lower().startswith("sched_")]:
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert host.own_cores() == [0, 1, 2]
    host.keep_to_cores([0])
    with host.threads_that_do_not_preempt():
        pass
    assert host.own_cores() == [0, 1, 2]


@pytest.mark.parametrize(
    ("names", "expected"), [(["lo", "eth0"], "lo"), (["lo0", "en0", "awdl0"], "lo0"), (["lo", "lo0"], "lo"), ([], "lo")]
)
def test_loopback_interface_is_found(names: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(names)))
    assert host.loopback() == expected


@pytest.mark.parametrize(
    ("macos", "there_are", "expected"),
    [
        (False, ["fork", "spawn", "forkserver"], ("forkserver", "fork", "libx.so")),
        (True, ["spawn", "fork", "forkserver"], ("spawn", "spawn", "libx.dylib")),
        (False, ["spawn"], ("spawn", "spawn", "libx.so")),
    ],
)
def test_fork_is_used_only_if_it_is_safe(
    macos: bool, there_are: list[str], expected: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "MACOS", macos)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: there_are)
    assert (host.start_method(), host.worker_start_method(), host.library_file("x")) == expected


WATCHED = """
import multiprocessing, os, sys, time
from cifar_exp.system import host
from cifar_exp.system.cpu_quota import cpu_quota, throttled_seconds

def child(ready):
    host.c_function = lambda name: None  # there is no prctl
    host.end_with_parent()
    ready.put(os.getpid())
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    ready = context.SimpleQueue()
    context.Process(target=child, args=(ready,)).start()
    print(ready.get(), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_without_prctl_a_process_ends_with_its_parent_all_the_same(method: str, tmp_path: Path) -> None:
    script = tmp_path / "watched.py"
    script.write_text(WATCHED)
    parent = subprocess.Popen([sys.executable, script, method], env=environment(), stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([child], timeout=60)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


WINDOWS = """
import runpy, sys
sys.platform = "win32"
try:
    runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
finally:
    heavy = {"torch", "hydra", "numpy", "mlflow", "psutil", "omegaconf", "resource"} & set(sys.modules)
    sys.stdout.write(" ".join(heavy))
"""


@pytest.mark.parametrize("module", MODULES)
def test_windows_is_refused_with_a_remedy(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-c", WINDOWS, module], env=environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    first, *commands = done.stderr.splitlines()
    assert "WSL2" in first
    assert [line.split("  ")[1] for line in commands] == ["wsl --install", "wsl"]
    assert "the two commands of the README" in commands[1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("module", PARTS)
def test_submodule_started_alone_is_refused_with_a_remedy(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"cifar-exp: {module} is part of the command and cannot run alone. Run python -m cifar_exp\n"
    )


def test_only_the_main_module_is_checked() -> None:
    """Arguments of a user's program are ignored."""
    assert misstarted(["python", "-B", "-m", "cifar_exp.cli.train", "seed=1"])
    assert not misstarted(["python", "program.py", "-m", "cifar_exp.cli.train"])
    assert not misstarted(["python", "-m", "cifar_exp", "-m", "cifar_exp.cli.train"])
    assert not misstarted(["python", "-m"])


@pytest.mark.parametrize("module", MODULES)
def test_each_command_is_a_module_that_runs(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cifar-exp" in done.stdout
    assert done.stderr == ""


NOT_INSTALLED = """
import importlib.metadata as metadata
def version(name, found=metadata.version):
    if name == "cifar-exp":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
from cifar_exp.cli.main import run_command
raise SystemExit(run_command(["--version"]))
"""


def test_command_works_from_source_without_installation() -> None:
    """As with the source folder on ``PYTHONPATH``."""
    start = [sys.executable, "-c", NOT_INSTALLED]
    done = subprocess.run(start, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "cifar-exp, version of source code that is not installed\n"), (
        done.stderr
    )


LATE = """
import multiprocessing, os, sys, time
from pathlib import Path
from cifar_exp.system import host

def child(ready):
    ready.put(os.getpid())
    while multiprocessing.parent_process().is_alive():
        time.sleep(0.01)
    host.end_with_parent()
    Path(sys.argv[2]).touch()

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    ready = context.SimpleQueue()
    context.Process(target=child, args=(ready,)).start()
    print(ready.get(), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_a_process_whose_parent_ended_before_it_asked_ends_too(method: str, tmp_path: Path) -> None:
    script, survived = tmp_path / "late.py", tmp_path / "survived"
    script.write_text(LATE)
    words = [sys.executable, script, method, survived]
    with subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    child.wait(timeout=60)
    assert not survived.exists()
