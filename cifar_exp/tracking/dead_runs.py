"""Close runs that MLflow still shows as running although their process has died."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_exp.records.journal import run_id
from cifar_exp.records.run_folder import Outcome, is_undelivered
from cifar_exp.system.locks import Owner
from cifar_exp.system.printable import tell
from cifar_exp.tracking.own_store import sync_command

if TYPE_CHECKING:
    from mlflow import MlflowClient

PREFIX = "process."  # of the tags that name a run's process
FOLDER_TAG = "folder"


def owner_tags(run_dir: Path) -> dict[str, str]:
    """Tags that name the process that feeds a run, and the run's folder."""
    owner = {f"{PREFIX}{name}": str(value) for name, value in asdict(Owner.here()).items()}
    return owner | {FOLDER_TAG: str(run_dir.resolve())}


def is_dead(tags: Mapping[str, str]) -> bool:
    """Whether the process named by these tags ran on this host and has ended."""
    owner = _owner(tags)
    return owner is not None and owner.is_gone()


def close_dead_runs(client: "MlflowClient", experiment_id: str) -> None:
    """Close the experiment's RUNNING runs whose process on this host has ended.

    The status is that of ``outcome.json``, else KILLED; FINISHED if only the journal was completed.
    """
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
            if outcome and outcome.status == "FINISHED" and is_undelivered(folder):
                message = f"{folder}: its process died before MLflow had everything. Run {sync_command(folder)}"
                tell(message)


def _owner(tags: Mapping[str, str]) -> Owner | None:
    """The process named by the tags; None where there is none."""
    fields = {name.removeprefix(PREFIX): value for name, value in tags.items() if name.startswith(PREFIX)}
    try:
        return Owner(**{**fields, "pid": int(fields["pid"])})  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        return None


def _outcome(tags: Mapping[str, str], identity: str) -> Outcome | None:
    folder = Path(tags.get(FOLDER_TAG, ""))
    with suppress(OSError, ValueError):  # the store names the folder, and it may be anybody's
        return Outcome.of(folder) if run_id(folder) == identity else None
    return None
