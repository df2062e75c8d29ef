"""File systems without fsync or locks: saves succeed, and only one process trains in a folder."""

import errno
import fcntl
import inspect
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from cifar_exp.errors import ConfigError, MachineError, StorageError
from cifar_exp.launch.elastic import _shared_folder
from cifar_exp.launch.failures import first_failure
from cifar_exp.launch.forkserver import start_fork_server
from cifar_exp.launch.watchdog import Watchdog
from cifar_exp.records.journal import Entry, JournalWriter, read
from cifar_exp.records.run_folder import is_locked, lock_run_folder
from cifar_exp.system.atomic_files import atomic_folder, write_atomically
from cifar_exp.system.locks import HeldError, acquire
from cifar_exp.system.temp_folder import private_folder
from tests.conftest import environment

REFUSALS = [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP]


def refuse_fsync(monkeypatch: pytest.MonkeyPatch, number: int, of_files: bool) -> None:
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if of_files or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)


@pytest.mark.parametrize(
    ("number", "of_files"),
    [
        *((number, False) for number in [*REFUSALS, errno.EIO, errno.EBADF, errno.EACCES]),
        *((n, True) for n in REFUSALS),
    ],
)
def test_save_succeeds_if_folders_cannot_be_fsynced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, of_files: bool
) -> None:
    refuse_fsync(monkeypatch, number, of_files)
    write_atomically(tmp_path / "file", "content")
    with atomic_folder(tmp_path / "folder") as unfinished:
        (unfinished / "file").write_text("content")
    with JournalWriter(tmp_path) as journal:
        journal.write(Entry(1, 1, 0.5, {"loss": 2.0}))
        journal.sync()
    assert (tmp_path / "file").read_text() == (tmp_path / "folder/file").read_text() == "content"
    assert [entry.metrics for entry in read(tmp_path)] == [{"loss": 2.0}]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    refuse_fsync(monkeypatch, number, of_files=True)
    with pytest.raises(OSError, match=os.strerror(number)):
        write_atomically(tmp_path / "file", "content")
    assert list(tmp_path.iterdir()) == []


def refuse_flock(number: int) -> None:
    def refuse(_descriptor: int, _operation: int) -> None:
        raise OSError(number, os.strerror(number))

    fcntl.flock = refuse  # type: ignore[assignment]


@pytest.fixture(params=[errno.ENOLCK, *REFUSALS], ids=errno.errorcode.get)
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)  # restored after the test
    refuse_flock(request.param)
    return int(request.param)


@pytest.mark.usefixtures("without_locks")
def test_without_locks_one_process_alone_trains_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # those of other processes here have locks
    with lock_run_folder(tmp_path):
        assert is_locked(tmp_path)
        remedy = rf"\(process {os.getpid()} on .*\)\. .*or remove .*/\.lock\.held if that process"
        with pytest.raises(ConfigError, match=remedy):
            lock_run_folder(tmp_path, patience=0)
    assert not is_locked(tmp_path)
    lock_run_folder(tmp_path, patience=0).release()
    with private_folder() as folder:
        assert folder.exists()
    assert not folder.exists()


def test_marker_of_a_killed_process_is_ignored_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)  # restored after the test
    refuse_flock(errno.ENOLCK)
    code = f"""
import fcntl
from pathlib import Path
from cifar_exp.system.locks import acquire
{inspect.getsource(refuse_flock)}
refuse_flock({errno.ENOLCK})
lock = acquire(Path("lock"))
print("locked", flush=True)
input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", "import errno, os\n" + code],
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stdout.readline() == b"locked\n"
    with pytest.raises(HeldError, match=f"process {process.pid} on"):
        acquire(tmp_path / "lock")
    process.kill()
    process.communicate()
    acquire(tmp_path / "lock").release()


def test_a_folder_that_can_only_be_read_is_not_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert not is_locked(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOSYS])
def test_shared_memory_too_full_for_a_lock_is_refused(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("multiprocessing.synchronize.Lock", refuse)
    monkeypatch.setattr("multiprocessing.resource_tracker.ensure_running", lambda: pytest.fail("something was started"))
    message = rf"^/dev/shm: .*: {os.strerror(number)}\. .*set --shm-size=1g or --ipc=host$"
    with pytest.raises(MachineError, match=message):
        start_fork_server()


def test_missing_temporary_folder_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(StorageError, match=r"/gone cannot be written: No such .*\. Set TMPDIR="), _shared_folder():
        pass


@pytest.mark.parametrize("gone", ["ranks", "sockets"])
def test_temporary_folder_cleaned_during_training_is_named_as_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """The ranks' own errors differ, but this is their cause."""
    folders = {name: tmp_path / name for name in ("ranks", "sockets")}
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", str(folders["sockets"]))  # type: ignore[attr-defined]
    for folder in folders.values():
        folder.mkdir()
    watchdog = Watchdog(folders["ranks"], 1, timeout=30.0)
    failed = ChildFailedError("run_rank", {0: ProcessFailure(0, 1, -signal.SIGBUS, "")})
    assert "rank 0 died without an error (killed by SIGBUS: /dev/shm or a disk is full" in str(
        first_failure(failed, folders["ranks"], watchdog, 0)
    )
    folders[gone].rmdir()
    cause = first_failure(failed, folders["ranks"], watchdog, 0)
    assert isinstance(cause, StorageError)
    assert str(cause).startswith(f"TMPDIR={tmp_path}: folders in it that the run needs were removed while it ran")
