"""Checkpoints: a kill at each step of a save; truncated, bit-flipped, exchanged and malicious files."""

import hashlib
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import torch

from cifar_exp.errors import StorageError
from cifar_exp.records import checkpoint
from cifar_exp.records.run_folder import CHECKPOINTS
from tests.faults.registry import case
from tests.faults.runs import (
    EPOCHS_A_TRY,
    HERE,
    UNTRACKED,
    assert_recorded_once,
    assert_same_as_uninterrupted,
    reference,
    settings,
)
from tests.faults.scene import Scene, check_exit
from tests.helpers.checkpoints import Malicious, position, reseal, trained

STEPS = {
    "while the network is written": ("fsync", "*.pt.cifar-exp-tmp", 3, "cut"),
    "before the network is flushed": ("fsync", "*.pt.cifar-exp-tmp", 3, "kill"),
    "before the network is renamed": ("replace", "*.pt.cifar-exp-tmp", 3, "kill"),
    "before the network's name is flushed": ("fsync", CHECKPOINTS, 5, "kill"),
    "while the manifest is written": ("fsync", "*.json.cifar-exp-tmp", 3, "cut"),
    "before the manifest is flushed": ("fsync", "*.json.cifar-exp-tmp", 3, "kill"),
    "before the manifest is renamed": ("replace", "*.json.cifar-exp-tmp", 3, "kill"),
    "before the manifest's name is flushed": ("fsync", CHECKPOINTS, 6, "kill"),
    "before the oldest manifest is deleted": ("unlink", "*.json", 2, "kill"),
    "before the oldest network is deleted": ("unlink", "*.pt", 2, "kill"),
}


@case(*(f"SIGKILL in a save, {step}" for step in STEPS))
def killed_in_a_save(scene: Scene) -> None:
    """Kill one run at each step of a save in turn. It resumes from the newest complete checkpoint each time."""
    run = settings(60)
    for step, (call, file, number, do) in STEPS.items():
        before = newest_step(scene.folder / "run")
        plan = {"point": call, "file": file, "rank": 0, "number": number, "do": do}
        check_exit(scene.run(*run, *HERE, plan=plan), 7, "rank 0", "SIGKILL")
        assert newest_step(scene.folder / "run") > before, "no new checkpoint"
        scene.handled(f"SIGKILL in a save, {step}", "resumes, bit for bit")
    check_exit(scene.run(*run, *HERE), 0)
    assert_recorded_once(scene)
    assert_same_as_uninterrupted(scene, run)


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint. No checkpoint may be damaged."""
    warnings: list[str] = []
    manifest = checkpoint.newest_intact_manifest(run_dir, warnings.append)
    assert not warnings, warnings
    return manifest.step if manifest else -1


@case(
    "a checkpoint cut at every 4 KiB", "flipped bytes in a checkpoint", "flipped or cut bytes in a manifest", quick=True
)
def damaged_checkpoints(scene: Scene) -> None:
    """In one process, thousands of damaged checkpoints: none is loaded; the previous one is used."""
    run_dir = scene.folder / "run"
    for step in (10, 20):
        checkpoint.save(run_dir, trained(step), position(step), keep=2)
    network = run_dir / CHECKPOINTS / "step-00000020.pt"
    manifest = network.with_suffix(".json")
    total = min(scene.suite.damages, 300) if scene.suite.repeat == 1 else scene.suite.damages
    kinds = {
        "a checkpoint cut at every 4 KiB": (network, cuts(network.read_bytes(), 4096)),
        "flipped or cut bytes in a manifest": (manifest, damaged(manifest.read_bytes(), total // 10, scene.random)),
    }
    loaded = tried = 0
    for fault, (path, damages) in kinds.items():
        count, wrong = try_damages(run_dir, path, damages)
        tried, loaded = tried + count, loaded + wrong
        assert wrong == 0, f"{wrong} of {count} damaged checkpoints were loaded ({path.name})"
        scene.handled(fault, f"{count:,} tried, 0 loaded: the one before is used")
    count, wrong = try_damages(run_dir, network, flips(network.read_bytes(), total - tried, scene.random))
    assert wrong == 0, f"{wrong} of {count} damaged checkpoints were loaded ({network.name})"
    scene.handled("flipped bytes in a checkpoint", f"{count:,} tried, 0 loaded: the one before is used")


def try_damages(run_dir: Path, path: Path, damages: Iterator[bytes]) -> tuple[int, int]:
    """Return how many damaged files were tried, and how many were not detected."""
    whole, count, wrong = path.read_bytes(), 0, 0
    for content in damages:
        path.write_bytes(content)
        warnings: list[str] = []
        found = checkpoint.newest_intact_manifest(run_dir, warnings.append)
        count += 1
        wrong += found is None or found.step != 10 or len(warnings) != 1 or path.stem not in warnings[0]
    path.write_bytes(whole)
    found = checkpoint.newest_intact_manifest(run_dir, lambda _: None)
    assert found is not None
    assert found.step == 20, "the intact checkpoint is not used any more"
    return count, wrong


def cuts(whole: bytes, every: int) -> Iterator[bytes]:
    return (whole[:size] for size in range(0, len(whole), every))


def flips(whole: bytes, count: int, random: Random) -> Iterator[bytes]:
    """Change one random byte."""
    for _ in range(count):
        place = random.randrange(len(whole))
        yield whole[:place] + bytes([whole[place] ^ random.randrange(1, 256)]) + whole[place + 1 :]


def damaged(whole: bytes, count: int, random: Random) -> Iterator[bytes]:
    """Change one byte in half of them and truncate the other half. A trailing newline stays."""
    whole = whole.rstrip()
    yield from flips(whole, count // 2, random)
    for _ in range(count - count // 2):
        yield whole[: random.randrange(len(whole))]


def copy_of_killed_run(scene: Scene, run: tuple[str, ...], name: str) -> Path:
    """Copy the uninterrupted run and cut its journal, as if its parent had been killed."""
    folder = Path(shutil.copytree(reference(scene, run), scene.folder / name))
    journal = folder / "metrics.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-2]))
    return folder


@case("the newest checkpoint is damaged", quick=True)
def newest_damaged(scene: Scene) -> None:
    run = settings(EPOCHS_A_TRY)
    newest = max((copy_of_killed_run(scene, run, "run") / CHECKPOINTS).glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1])
    ended = scene.run(*run, *HERE, *UNTRACKED)
    check_exit(ended, 0, newest.name, "damaged and is skipped")
    assert_same_as_uninterrupted(scene, run)
    scene.handled("the newest checkpoint is damaged", "resumes from the previous one, bit for bit")


def check_refused_start(scene: Scene, fault: str, damage: Callable[[Path], None], code: int, *words: str) -> None:
    """Check that a start names the damaged file. (``resume=never`` in another folder would start again.)"""
    run = settings(EPOCHS_A_TRY)
    damage(copy_of_killed_run(scene, run, "run"))
    check_exit(scene.run(*run, *HERE, *UNTRACKED), code, *words)
    scene.handled(fault, "the same; resume=never in another folder starts again")


@case("all checkpoints are damaged")
def all_damaged(scene: Scene) -> None:
    def damage(folder: Path) -> None:
        for path in (folder / CHECKPOINTS).glob("*.pt"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    check_refused_start(scene, "all checkpoints are damaged", damage, 8, "are damaged", "resume=never")


@case("the checkpoints are gone")
def checkpoints_gone(scene: Scene) -> None:
    def damage(folder: Path) -> None:
        shutil.rmtree(folder / CHECKPOINTS)

    check_refused_start(scene, "the checkpoints are gone", damage, 8, "checkpoints are gone", "resume=never")


@case("a damaged journal")
def journal_damaged(scene: Scene) -> None:
    def damage(folder: Path) -> None:
        path = folder / "metrics.jsonl"
        content = path.read_bytes()
        path.write_bytes(content[:100] + b"\xff\x00{" + content[103:])

    check_refused_start(scene, "a damaged journal", damage, 8, "metrics.jsonl", "resume=never")


@case("a damaged run.json and config.yaml")
def records_damaged(scene: Scene) -> None:
    def damage(folder: Path) -> None:
        (folder / "config.yaml").write_text("train: {epochs: ")

    check_refused_start(scene, "a damaged run.json and config.yaml", damage, 8, "config.yaml", "resume=never")


@case("checkpoints that were exchanged")
def checkpoints_exchanged(scene: Scene) -> None:
    """Two checkpoints have each other's content. Neither is loaded."""
    run_dir = scene.folder / "run"
    for step in (10, 20, 30):
        checkpoint.save(run_dir, trained(step), position(step), keep=3)
    names = [run_dir / CHECKPOINTS / f"step-000000{step}.pt" for step in (20, 30)]
    contents = [path.read_bytes() for path in names]
    for path, content in zip(names, reversed(contents), strict=True):
        path.write_bytes(content)
    warnings: list[str] = []
    found = checkpoint.newest_intact_manifest(run_dir, warnings.append)
    assert found is not None
    assert (found.step, len(warnings)) == (10, 2)
    scene.handled("checkpoints that were exchanged", "the previous one is used")


@case("a malicious pickle as a checkpoint", quick=True)
def malicious_pickle(scene: Scene) -> None:
    """Prediction does not execute code in a checkpoint, even if its sha256 matches."""
    run_dir, marker = scene.folder / "run", scene.folder / "executed"
    pickle.loads(pickle.dumps(Malicious(marker)))
    marker.rmdir()  # the pickle does execute code
    checkpoint.save(run_dir, trained(), position(10), keep=2)
    path = run_dir / CHECKPOINTS / "step-00000010.pt"
    torch.save(dict(vars(trained())) | {"classes": Malicious(marker)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    reseal(path.with_suffix(".json"), bytes=path.stat().st_size, sha256=digest)
    check_exit(scene.run("predict", "run", str(scene.folder)), 8, path.name, "cannot be read")
    assert not marker.exists(), "code in a checkpoint was executed"
    scene.handled("a malicious pickle as a checkpoint", "the same")


@case("a manifest that names a file elsewhere")
def manifest_points_elsewhere(scene: Scene) -> None:
    run_dir = scene.folder / "run"
    checkpoint.save(run_dir, trained(), position(10), keep=2)
    outside = scene.folder / "outside.pt"
    shutil.copy(run_dir / CHECKPOINTS / "step-00000010.pt", outside)
    reseal(run_dir / CHECKPOINTS / "step-00000010.json", file="../../outside.pt")
    with pytest.raises(StorageError, match="damaged"):
        checkpoint.newest_intact_manifest(run_dir, lambda _: None)
    scene.handled("a manifest that names a file elsewhere", "the same")
