"""Continue a sweep in its own folder."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cifar_exp.config.result_settings import NO_PART_OF_A_SWEEP
from cifar_exp.errors import ConfigError
from cifar_exp.records.find_run import find_folder
from cifar_exp.records.run_folder import OUTPUTS, claim, is_claimed, make_private
from cifar_exp.runs.config_changes import UNREADABLE
from cifar_exp.system.atomic_files import write_json
from cifar_exp.system.redaction import masked

SWEEP_FILE = "sweep.json"


@contextmanager
def claimed_sweep(sweep_dir: Path, wanted: str, arguments: Sequence[str]) -> Iterator[Path]:
    """Hold the folder of the sweep that these arguments ask for: an interrupted one's, or ``sweep_dir`` for a new one.

    Args:
        sweep_dir: for a new sweep.
        wanted: ``resume``: never, auto, or the folder or MLflow run id of a sweep or a run.
        arguments: the sweep's overrides.

    Raises:
        ConfigError: where the folder is that of a sweep of other jobs, or another process is at it.
    """
    arguments = masked([argument for argument in arguments if argument.partition("=")[0] not in NO_PART_OF_A_SWEEP])
    for path in _sweeps(wanted):
        content = _sweep_content(path)
        if content is None or (wanted == "auto" and (content["finished"] or is_claimed(path.parent))):
            continue
        if content["arguments"] == arguments:
            with claim(path.parent):
                yield path.parent
            return
        if wanted != "auto":
            told = " ".join(content["arguments"])
            raise ConfigError(f"resume={wanted}: that sweep's overrides were {told}. Use these")
    if (sweep_dir / SWEEP_FILE).exists():
        raise ConfigError(
            f"hydra.sweep.dir={sweep_dir}: the folder holds a sweep already. Set resume={sweep_dir} to go on with it, "
            f"or another folder"
        )
    sweep_dir.mkdir(parents=True, exist_ok=True)
    make_private(sweep_dir)
    with claim(sweep_dir):
        _note_sweep(sweep_dir, arguments, finished=False)
        yield sweep_dir


def end_sweep(sweep_dir: Path) -> None:
    """Leave word that all jobs came to their end."""
    arguments = json.loads((sweep_dir / SWEEP_FILE).read_text())["arguments"]
    _note_sweep(sweep_dir, arguments, finished=True)


def _note_sweep(sweep_dir: Path, arguments: Sequence[str], finished: bool) -> None:
    write_json(sweep_dir / SWEEP_FILE, {"arguments": list(arguments), "finished": finished})


def _sweep_content(path: Path) -> dict[str, Any] | None:
    """What is known of a sweep; None where its file is damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        return content if {"arguments", "finished"} <= content.keys() else None
    except UNREADABLE:
        return None


def _sweeps(wanted: str) -> list[Path]:
    """The sweep files that ``resume`` may mean, newest first; none for ``never`` or where it names a single run."""
    if wanted == "never":
        return []
    if wanted == "auto":
        return sorted(OUTPUTS.rglob(SWEEP_FILE), key=lambda path: path.stat().st_mtime, reverse=True)
    folder = find_folder(wanted, SWEEP_FILE)
    return [folder / SWEEP_FILE] if folder else []
