"""The names of checkpoint files. Other files in ``checkpoints/`` belong to the user: ignored, never removed."""

import re
from pathlib import Path

from cifar_exp.records.run_folder import CHECKPOINTS
from cifar_exp.system import foreign_files

_MANIFEST = re.compile(r"step-(\d{8,})\.json")
# Left by a writer that was killed; the second form was written by versions before 0.2.
_LEFTOVER = re.compile(r"\.step-\d{8,}(-again)?\.(pt|json)\.cifar-exp-tmp|step-\d{8,}(-again)?\.(pt|json)\.tmp")


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """The .pt path of a step."""
    return run_dir / CHECKPOINTS / f"step-{step:08}.pt"


def manifests(run_dir: Path) -> list[Path]:
    """The manifest files, sorted by step."""
    folder = run_dir / CHECKPOINTS
    if not folder.is_dir():
        return []
    found = {path: match for path in folder.iterdir() if (match := _MANIFEST.fullmatch(path.name)) and path.is_file()}
    return sorted(found, key=lambda path: int(found[path][1]))


def is_named_by(manifest: Path, file: str) -> bool:
    """Whether ``file`` is a name of the checkpoint whose manifest is at the path ``manifest``."""
    return file in (f"{manifest.stem}.pt", f"{manifest.stem}-again.pt")


def remove_leftovers(run_dir: Path) -> None:
    """Remove the temporary files of a writer that was killed."""
    for path in (run_dir / CHECKPOINTS).iterdir():
        if _LEFTOVER.fullmatch(path.name) and not path.is_dir():
            path.unlink()


def free_path(path: Path) -> Path:
    """The .pt path for a new save of a step.

    If the step's manifest already names ``step-N.pt``, it is ``step-N-again.pt``, so the old checkpoint stays valid
    until the manifest is replaced.
    """
    try:
        named = foreign_files.read_json(path.with_suffix(".json"))["file"]
    except (OSError, ValueError, TypeError, KeyError):  # no manifest, or a damaged one
        return path
    return path.with_stem(f"{path.stem}-again") if named == path.name else path


def delete_checkpoint(manifest: Path, but: Path | None = None) -> None:
    """Delete a step's .pt files, except ``but``."""
    for path in {manifest.with_suffix(".pt"), manifest.with_name(f"{manifest.stem}-again.pt")} - {but}:
        path.unlink(missing_ok=True)


def best_named_by(manifest: Path) -> Path:
    """The manifest of the best checkpoint that ``manifest`` names; ``manifest`` itself where it names none."""
    try:
        step = foreign_files.read_json(manifest)["best_step"]
        return manifest if step is None else checkpoint_path(manifest.parents[1], int(step)).with_suffix(".json")
    except (OSError, ValueError, TypeError, KeyError):  # damaged, or written by an earlier version
        return manifest
