"""File systems that are full, read-only, too small or removed; processes that may open few files."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.registry import case
from tests.faults.runs import HERE, UNTRACKED, assert_same_as_uninterrupted, check_exit_and_status, settings, statuses
from tests.faults.scene import Scene, check_exit

LARGE = "model.width=32"  # checkpoints of about 1.2 MB
IN_OUTPUTS = ("hydra.run.dir=outputs/run", "resume=auto")


@contextmanager
def tmpfs(path: Path, size: str) -> Iterator[Path]:
    """Mount a file system of ``size`` (``1m``) at ``path``, in the suite's private mount namespace."""
    path.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def remount(path: Path, options: str) -> None:
    mount("-o", f"remount,{options}", str(path))


def fill(folder: Path) -> Path:
    """Create a file that takes all free space."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
    return filler


@case("a 1 MiB file system under outputs", needs=("mounts",))
def tiny_outputs(scene: Scene) -> None:
    run = settings(4, LARGE)
    with tmpfs(scene.folder / "outputs", "1m") as outputs:
        check_exit(scene.run(*run, *IN_OUTPUTS, *UNTRACKED), 8, "outputs/run", "No space left", "Free space")
        scene.check_files()
        remount(outputs, "size=64m")
        check_exit(scene.run(*run, *IN_OUTPUTS, *UNTRACKED), 0)
        assert_same_as_uninterrupted(scene, run, "outputs/run")
        scene.check_files()
    scene.handled("a 1 MiB file system under outputs", "resumes, bit for bit, once there is space")


@case("a file system that fills up while it trains", needs=("mounts",))
def outputs_fill_up(scene: Scene) -> None:
    run = settings(40, LARGE)
    with tmpfs(scene.folder / "outputs", "16m") as outputs:
        running = scene.start(*run, *IN_OUTPUTS, *UNTRACKED, plan={"pace": 0.01})
        running.until_training(scene.journal("outputs/run"), lines=20)
        filler = fill(outputs)
        check_exit(running.wait(), 8, "outputs/run", "No space left", "Free space")
        filler.unlink()
        scene.check_files()
        check_exit(scene.run(*run, *IN_OUTPUTS, *UNTRACKED), 0)
        assert_same_as_uninterrupted(scene, run, "outputs/run")
    scene.handled("a file system that fills up while it trains", "resumes, bit for bit, once there is space")


@case("a read-only mount under outputs", needs=("mounts",))
def read_only_outputs(scene: Scene) -> None:
    run = settings(4)
    with tmpfs(scene.folder / "outputs", "64m") as outputs:
        remount(outputs, "ro")
        check_exit(scene.run(*run, "hydra.run.dir=outputs/run"), 8, "hydra.run.dir", "Read-only file system")
        remount(outputs, "rw")
        check_exit(scene.run(*run, "hydra.run.dir=outputs/run"), 0)
        assert statuses(scene) == ["FINISHED"]
        assert_same_as_uninterrupted(scene, run, "outputs/run")
    scene.handled("a read-only mount under outputs", "trains once the folder is writable")


@case("a read-only mount under data", needs=("mounts",))
def read_only_data(scene: Scene) -> None:
    run = settings(4)
    with tmpfs(scene.folder / "data", "64m") as data:
        remount(data, "ro")
        check_exit_and_status(scene, scene.run(*run, *HERE), 8, "FAILED", "data.root", "Read-only file system")
        remount(data, "rw")
        check_exit_and_status(scene, scene.run(*run, *HERE), 0, "FINISHED")
        assert_same_as_uninterrupted(scene, run)
    scene.handled("a read-only mount under data", "trains once the folder is writable")


@case("no space for the images", needs=("mounts",))
def no_space_for_images(scene: Scene) -> None:
    run = settings(4)
    with tmpfs(scene.folder / "data", "200k") as data:
        check_exit(scene.run(*run, *HERE, *UNTRACKED), 8, "data.root", "cannot be written", "Free space")
        assert not list(data.rglob("unfinished-*")), "unfinished images are left"
        remount(data, "size=64m")
        check_exit(scene.run(*run, *HERE, *UNTRACKED), 0)
        assert_same_as_uninterrupted(scene, run)
    scene.handled("no space for the images", "trains once there is space")


@case("a full temporary folder", needs=("mounts",))
def full_tmp(scene: Scene) -> None:
    """The run uses another folder, or the message names TMPDIR."""
    run = settings(4)
    with tmpfs(scene.base / "full", "64k") as folder:
        fill(folder)
        ended = scene.run(*run, *HERE, *UNTRACKED, tmp=folder)
        check_exit(ended, ended.code if ended.code == 0 else 8)
        assert ended.code == 0 or "TMPDIR" in ended.err, ended.err
    check_exit(scene.run(*run, *HERE, *UNTRACKED), 0)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("a full temporary folder", "trains, or finds it finished")


@case("files may not grow beyond a limit (RLIMIT_FSIZE)", needs=("linux",))
def file_size_limit(scene: Scene) -> None:
    run = settings(4, LARGE)
    # Generate the images without the limit, because they exceed it.
    check_exit(scene.run(*run, "hydra.run.dir=images", "train.epochs=1", *UNTRACKED), 0)
    limited = ["prlimit", "--fsize=600000"]
    check_exit(scene.run(*run, *HERE, *UNTRACKED, before=limited), 8, "could not be saved", "File too large")
    check_exit(scene.run(*run, *HERE, *UNTRACKED), 0)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("files may not grow beyond a limit (RLIMIT_FSIZE)", "trains without the limit, bit for bit")


@case("few files may be open (RLIMIT_NOFILE)", needs=("linux",))
def few_open_files(scene: Scene) -> None:
    """It trains, or the message names the limit."""
    run = settings(4)
    for number, limit in enumerate((32, 128, 255, 256)):
        here = (f"hydra.run.dir=run-{number}", "resume=auto")
        ended = scene.run(*run, *here, before=["prlimit", f"--nofile={limit}"])
        check_exit(ended, ended.code if ended.code in (0, 4, 5, 8) else 4)
        assert ended.code == 0 or "ulimit -n" in ended.err, ended.err
        check_exit(scene.run(*run, *here), 0)
        assert_same_as_uninterrupted(scene, run, f"run-{number}")
    scene.handled("few files may be open (RLIMIT_NOFILE)", "trains without the limit, bit for bit")


@case("the run's folder is deleted while it trains", needs=("linux",))
def folder_deleted(scene: Scene) -> None:
    run = settings(100_000)
    running = scene.start(*run, *HERE, plan={"pace": 0.01})
    running.until_training(scene.journal(), lines=10)
    running.until((scene.folder / "run" / "mlflow_run_id").exists, "its MLflow run")
    shutil.rmtree(scene.folder / "run", ignore_errors=True)
    check_exit(running.wait(), 8, "run")
    assert statuses(scene) == ["FAILED"]
    again = settings(4)
    shutil.rmtree(scene.folder / "run", ignore_errors=True)
    check_exit(scene.run(*again, *HERE), 0)
    assert_same_as_uninterrupted(scene, again)
    scene.handled("the run's folder is deleted while it trains", "starts again")


@case("damaged decoded images")
def damaged_image_cache(scene: Scene) -> None:
    """Truncated arrays are generated again."""
    run = settings(4)
    check_exit(scene.run(*run, "hydra.run.dir=first", "train.epochs=1", *UNTRACKED), 0)
    for path in (scene.folder / "data").rglob("train_*.npy"):
        path.write_bytes(path.read_bytes()[:-100])
    check_exit(scene.run(*run, *HERE, *UNTRACKED), 0)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("damaged decoded images", "none needed: they are generated again")
