"""Detect copies of a run folder, so that a copy becomes a separate run.

``run.json`` holds a random key, by which a tracker recognises the run. A copied folder has the same key. Two things
distinguish a copy from the original:

- The place: the path and inode of the folder. A folder is a copy if both differ from those in ``run.json`` and the
  folder at the noted path still has the same key. A folder that was moved, renamed or restored from a backup is not a
  copy.
- The sessions: each start adds a random id to ``run.json`` and then to the tracker's run. If the tracker's run has a
  session id that ``run.json`` lacks, another copy has continued the run, perhaps on another machine.
"""

import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cifar_exp.errors import FREE_SPACE, storage_errors
from cifar_exp.records.journal import RUN_ID_FILE, run_id
from cifar_exp.records.run_folder import RUN_FILE, SWEEP_RUN_FILE, RunInfo
from cifar_exp.system import foreign_files
from cifar_exp.system.atomic_files import write_json
from cifar_exp.system.folder_place import place_of

SESSIONS = 100  # the newest ones are kept in run.json
COPY_TAG = "copied_from"


def claimed(folder: Path, config_hash: str) -> tuple[RunInfo, Path | None]:
    """Start a session of the run in ``folder``. The caller holds its lock.

    Args:
        folder: a folder with a ``run.json``.
        config_hash: of the settings of this session. It may differ from the first one's in settings that have been
            added to the package since.

    Returns:
        The run, which has a new key if the folder is a copy, and the folder that it was copied from, if it is a copy of
        a run that a tracker knows.

    Raises:
        StorageError: ``run.json`` cannot be read or written.
    """
    RunInfo.load(folder)  # raises where it cannot be read
    content = _content(folder / RUN_FILE)
    original, known = original_of(folder, content), run_id(folder)
    if original:
        content = _with_new_key(folder, content, str(original))
    hashes = {content.get("config_hash"): None, **dict.fromkeys(content.get("config_hashes", ())), config_hash: None}
    sessions = [*content.get("sessions", ()), uuid.uuid4().hex][-SESSIONS:]
    content |= {"config_hashes": [*filter(None, hashes)], "place": place_of(folder), "sessions": sessions}
    with storage_errors(folder / RUN_FILE, FREE_SPACE):
        write_json(folder / RUN_FILE, content)
    return replace(RunInfo.load(folder), sessions=tuple(sessions)), original if known else None


def claimed_parent_run(folder: Path) -> RunInfo:
    """The parent run of the sweep in ``folder``, with a new key if the folder is a copy. The caller saves it."""
    run, content = RunInfo.load(folder), _content(folder / SWEEP_RUN_FILE)
    if original := original_of(folder, content):
        content = _with_new_key(folder, content, str(original))
        return replace(run, key=content["key"], tags=content["tags"])
    return run


def as_another_run(run: RunInfo) -> RunInfo:
    """The same run with a new key: another copy of the folder has continued the tracker's run."""
    content = _with_new_key(run.run_dir, _content(run.run_dir / RUN_FILE), run_id(run.run_dir) or "")
    content["sessions"] = list(run.sessions[-1:])
    write_json(run.run_dir / RUN_FILE, content)
    return replace(RunInfo.load(run.run_dir), sessions=run.sessions[-1:])


def original_of(folder: Path, content: Mapping[str, Any]) -> Path | None:
    """The folder that ``folder`` is a copy of; None if it is not a copy.

    Args:
        folder: the folder of a run or a sweep.
        content: of its ``run.json`` or ``sweep_run.json``. Earlier versions noted no place there.
    """
    noted, here = content.get("place"), place_of(folder)
    if not isinstance(noted, Mapping) or noted == here or noted.get("path") == here["path"] or not content.get("key"):
        return None
    if (noted.get("device"), noted.get("inode")) == (here["device"], here["inode"]):
        return None  # renamed
    original = Path(str(noted.get("path")))
    with suppress(OSError, ValueError):
        names = [name for name in (RUN_FILE, SWEEP_RUN_FILE) if (original / name).exists()]
        keys = [_content(original / name).get("key") for name in names]
        if content["key"] in keys and not original.samefile(folder):
            return original
    return None


def known_hashes(folder: Path, same_version: bool) -> frozenset[str]:
    """The config hashes that checkpoints of the run may have; empty if unknown.

    Two versions of this package can have different hashes for the same settings. ``run.json`` lists the hashes of all
    sessions. Earlier versions of this package listed the first session's only; it says nothing about checkpoints that
    another version wrote.

    Args:
        folder: the run folder.
        same_version: whether this version has written the checkpoint.
    """
    path = folder / RUN_FILE
    content = _content(path) if path.exists() else {}
    if "config_hashes" in content:
        return frozenset(content["config_hashes"])
    return frozenset({content["config_hash"]}) if same_version and "config_hash" in content else frozenset()


def _with_new_key(folder: Path, content: Mapping[str, Any], copied_from: str) -> dict[str, Any]:
    (folder / RUN_ID_FILE).unlink(missing_ok=True)
    tags = {**content["tags"], COPY_TAG: copied_from}
    return {**content, "key": uuid.uuid4().hex, "tags": tags, "sessions": []}


def _content(path: Path) -> dict[str, Any]:
    return foreign_files.read_json_object(path)
