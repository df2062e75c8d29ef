"""Checkpoints: killed at each step of a save, cut, flipped, exchanged, malicious."""

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
from tests.faults.scene import Scene, says
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
    """One run, killed at one step of a save after the other; it goes on from the newest whole checkpoint each time."""
    run = settings(60)
    for step, (call, file, number, do) in STEPS.items():
        before = newest_step(scene.folder / "run")
        plan = {"point": call, "file": file, "rank": 0, "number": number, "do": do}
        says(scene.run(*run, *HERE, plan=plan), 7, "rank 0", "SIGKILL")
        assert newest_step(scene.folder / "run") > before, "it did not get on"
        scene.handled(f"SIGKILL in a save, {step}", "goes on, bit for bit")
    says(scene.run(*run, *HERE), 0)
    assert_recorded_once(scene)
    assert_same_as_uninterrupted(scene, run)


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint, none of which may be damaged."""
    told: list[str] = []
    manifest = checkpoint.newest_intact_manifest(run_dir, told.append)
    assert not told, told
    return manifest.step if manifest else -1


@case(
    "a checkpoint cut at every 4 KiB", "flipped bytes in a checkpoint", "flipped or cut bytes in a manifest", quick=True
)
def damaged_checkpoints(scene: Scene) -> None:
    """In process: thousands of damaged checkpoints, of which none may be loaded; the one before is, each time."""
    run_dir = scene.folder / "run"
    for step in (10, 20):
        checkpoint.save(run_dir, trained(step), position(step), keep=2)
    network = run_dir / CHECKPOINTS / "step-00000020.pt"
    manifest = network.with_suffix(".json")
    total = min(scene.suite.damages, 300) if scene.suite.repeat == 1 else scene.suite.damages
    kinds = {
        "a checkpoint cut at every 4 KiB": (network, cuts(network.read_bytes(), 4096)),
        "flipped or cut bytes in a manifest": (manifest, spoilt(manifest.read_bytes(), total // 10, scene.random)),
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
    """How many damages were tried, and how many were not noticed."""
    whole, count, wrong = path.read_bytes(), 0, 0
    for content in damages:
        path.write_bytes(content)
        told: list[str] = []
        found = checkpoint.newest_intact_manifest(run_dir, told.append)
        count += 1
        wrong += found is None or found.step != 10 or len(told) != 1 or path.stem not in told[0]
    path.write_bytes(whole)
    found = checkpoint.newest_intact_manifest(run_dir, lambda _: None)
    assert found is not None
    assert found.step == 20, "the undamaged one is not taken any more"
    return count, wrong


def cuts(whole: bytes, every: int) -> Iterator[bytes]:
    return (whole[:size] for size in range(0, len(whole), every))


def flips(whole: bytes, count: int, random: Random) -> Iterator[bytes]:
    """One byte changed to any other, anywhere."""
    for _ in range(count):
        place = random.randrange(len(whole))
        yield whole[:place] + bytes([whole[place] ^ random.randrange(1, 256)]) + whole[place + 1 :]


def spoilt(whole: bytes, count: int, random: Random) -> Iterator[bytes]:
    """Half of them flips, half of them cuts, at any byte but those of a trailing newline."""
    whole = whole.rstrip()
    yield from flips(whole, count // 2, random)
    for _ in range(count - count // 2):
        yield whole[: random.randrange(len(whole))]


def copied(scene: Scene, run: tuple[str, ...], name: str) -> Path:
    """The uninterrupted run as if its parent had been killed before it was closed."""
    folder = Path(shutil.copytree(reference(scene, run), scene.folder / name))
    journal = folder / "metrics.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-2]))
    return folder


@case("the newest checkpoint is damaged", quick=True)
def newest_damaged(scene: Scene) -> None:
    run = settings(EPOCHS_A_TRY)
    newest = max((copied(scene, run, "run") / CHECKPOINTS).glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1])
    ended = scene.run(*run, *HERE, *UNTRACKED)
    says(ended, 0, newest.name, "damaged and is skipped")
    assert_same_as_uninterrupted(scene, run)
    scene.handled("the newest checkpoint is damaged", "goes on from the one before, bit for bit")


def refused_start(scene: Scene, fault: str, spoil: Callable[[Path], None], code: int, *words: str) -> None:
    """What was spoilt is named; a start without ``resume`` is not kept from beginning anew."""
    run = settings(EPOCHS_A_TRY)
    spoil(copied(scene, run, "run"))
    says(scene.run(*run, *HERE, *UNTRACKED), code, *words)
    scene.handled(fault, "the same; resume=never in another folder starts anew")


@case("all checkpoints are damaged")
def all_damaged(scene: Scene) -> None:
    def spoil(folder: Path) -> None:
        for path in (folder / CHECKPOINTS).glob("*.pt"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    refused_start(scene, "all checkpoints are damaged", spoil, 8, "are damaged", "resume=never")


@case("the checkpoints are gone")
def checkpoints_gone(scene: Scene) -> None:
    def spoil(folder: Path) -> None:
        shutil.rmtree(folder / CHECKPOINTS)

    refused_start(scene, "the checkpoints are gone", spoil, 8, "checkpoints are gone", "resume=never")


@case("a damaged journal")
def journal_damaged(scene: Scene) -> None:
    def spoil(folder: Path) -> None:
        path = folder / "metrics.jsonl"
        content = path.read_bytes()
        path.write_bytes(content[:100] + b"\xff\x00{" + content[103:])

    refused_start(scene, "a damaged journal", spoil, 8, "metrics.jsonl", "resume=never")


@case("a damaged run.json and config.yaml")
def records_damaged(scene: Scene) -> None:
    def spoil(folder: Path) -> None:
        (folder / "config.yaml").write_text("train: {epochs: ")

    refused_start(scene, "a damaged run.json and config.yaml", spoil, 8, "config.yaml", "resume=never")


@case("checkpoints that were exchanged")
def checkpoints_exchanged(scene: Scene) -> None:
    """One step's content under another's name, with its own manifest's hash: neither is believed."""
    run_dir = scene.folder / "run"
    for step in (10, 20, 30):
        checkpoint.save(run_dir, trained(step), position(step), keep=3)
    names = [run_dir / CHECKPOINTS / f"step-000000{step}.pt" for step in (20, 30)]
    contents = [path.read_bytes() for path in names]
    for path, content in zip(names, reversed(contents), strict=True):
        path.write_bytes(content)
    told: list[str] = []
    found = checkpoint.newest_intact_manifest(run_dir, told.append)
    assert found is not None
    assert (found.step, len(told)) == (10, 2)
    scene.handled("checkpoints that were exchanged", "the one before is used")


@case("a malicious pickle as a checkpoint", quick=True)
def malicious_pickle(scene: Scene) -> None:
    """Code in a checkpoint whose hash holds is not executed, by a start and by a prediction neither."""
    run_dir, marker = scene.folder / "run", scene.folder / "executed"
    pickle.loads(pickle.dumps(Malicious(marker)))
    marker.rmdir()  # it would have worked
    checkpoint.save(run_dir, trained(), position(10), keep=2)
    path = run_dir / CHECKPOINTS / "step-00000010.pt"
    torch.save(dict(vars(trained())) | {"classes": Malicious(marker)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    reseal(path.with_suffix(".json"), bytes=path.stat().st_size, sha256=digest)
    says(scene.run("predict", "run", str(scene.folder)), 8, path.name, "cannot be read")
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
