"""Runs that MLflow still shows as running although their process has died, with its machine or by itself."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_exp.records.journal import run_id
from cifar_exp.records.run_folder import Outcome, is_owed, sync_command
from cifar_exp.system.locks import Owner

if TYPE_CHECKING:
    from mlflow import MlflowClient

PREFIX = "process."  # of the tags that tell whose a run is
FOLDER_TAG = "folder"


def owner_tags(run_dir: Path) -> dict[str, str]:
    """Tags that tell which process feeds a run, and from which folder."""
    owner = {f"{PREFIX}{name}": str(value) for name, value in asdict(Owner.here()).items()}
    return owner | {FOLDER_TAG: str(run_dir.resolve())}


def is_dead(tags: Mapping[str, str]) -> bool:
    """Whether the process that fed the run with these tags was on this host and is gone."""
    owner = _owner(tags)
    return owner is not None and owner.is_gone()


def close_dead_runs(client: "MlflowClient", experiment_id: str) -> None:
    """Close the runs of an experiment whose process was on this host and is gone: as their folders say, else KILLED."""
    host = Owner.here().host.replace("'", "")
    running = client.search_runs(
        [experiment_id], f"attributes.status = 'RUNNING' and tags.`{PREFIX}host` = '{host}'", max_results=1000
    )
    for run in running:
        if is_dead(run.data.tags):
            outcome = _outcome(run.data.tags, run.info.run_id)
            ended = round(outcome.ended * 1000) if outcome else None
            client.set_terminated(run.info.run_id, outcome.status if outcome else "KILLED", ended)
            folder = Path(run.data.tags.get(FOLDER_TAG, ""))
            if outcome and outcome.status == "FINISHED" and is_owed(folder):
                told = f"{folder}: its process died before all of it was recorded. Type {sync_command(folder)}"
                print(f"cifar-exp: {told}", file=sys.stderr, flush=True)


def _owner(tags: Mapping[str, str]) -> Owner | None:
    """The process that the tags name; None where they name none."""
    fields = {name.removeprefix(PREFIX): value for name, value in tags.items() if name.startswith(PREFIX)}
    try:
        return Owner(**{**fields, "pid": int(fields["pid"])})  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        return None


def _outcome(tags: Mapping[str, str], identity: str) -> Outcome | None:
    folder = Path(tags.get(FOLDER_TAG, ""))
    return Outcome.of(folder) if run_id(folder) == identity else None
