"""Close runs that MLflow still shows as running although their process has died."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_exp.records.journal import run_id
from cifar_exp.records.run_folder import LOCK_FILE, Outcome, is_undelivered
from cifar_exp.system.locks import Owner, is_free
from cifar_exp.system.printable import print_notice
from cifar_exp.tracking.own_store import sync_command

if TYPE_CHECKING:
    from mlflow import MlflowClient

PREFIX = "process."  # of the tags that name a run's process
FOLDER_TAG = "folder"


def owner_tags(run_dir: Path) -> dict[str, str]:
    """Tags that name the process that logs a run, and the run's folder."""
    owner = {f"{PREFIX}{name}": str(value) for name, value in asdict(Owner.here()).items()}
    return owner | {FOLDER_TAG: str(run_dir.resolve())}


def is_dead(tags: Mapping[str, str], identity: str) -> bool:
    """Whether the process named by these tags of the run ``identity`` ran on this host and has ended.

    Containers number their processes separately. They share the kernel, so the lock of the run's folder decides.
    """
    owner = _owner(tags)
    if owner is None:
        return False
    return owner.is_gone() or (owner.shares_kernel and _is_lock_free(tags, identity))


def close_dead_runs(client: "MlflowClient", experiment_id: str) -> None:
    """Close the experiment's RUNNING runs whose process on this host, in any container, has ended.

    The status is taken from ``outcome.json``, else FINISHED if the journal is complete, else KILLED. For a
    run of another host the lock proves nothing, so a message says what to do if that run has ended.
    """
    running = client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=1000)
    for run in running:
        tags, identity = run.data.tags, run.info.run_id
        owner, folder = _owner(tags), Path(tags.get(FOLDER_TAG, ""))
        if is_dead(tags, identity):
            outcome = _outcome(tags, identity)
            ended = round(outcome.ended * 1000) if outcome else None
            client.set_terminated(identity, outcome.status if outcome else "KILLED", ended)
            if outcome and outcome.status == "FINISHED" and is_undelivered(folder):
                message = f"{folder}: its process died before MLflow had everything. Run {sync_command(folder)}"
                print_notice(message)
        elif owner and not owner.shares_kernel and _is_lock_free(tags, identity):
            print_notice(
                f"{folder}: MLflow shows the run as RUNNING on {owner.host_name}, and no process here holds its lock. "
                f"If it has ended, run {sync_command(folder)}"
            )


def _is_lock_free(tags: Mapping[str, str], identity: str) -> bool:
    """Whether the run's folder is here, and no process holds its lock."""
    folder = Path(tags.get(FOLDER_TAG, ""))
    with suppress(OSError, ValueError):  # another user's
        return run_id(folder) == identity and is_free(folder / LOCK_FILE)
    return False


def _owner(tags: Mapping[str, str]) -> Owner | None:
    """The process named by the tags; None if they name none."""
    fields = {name.removeprefix(PREFIX): value for name, value in tags.items() if name.startswith(PREFIX)}
    try:
        return Owner(**{**fields, "pid": int(fields["pid"])})  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        return None


def _outcome(tags: Mapping[str, str], identity: str) -> Outcome | None:
    folder = Path(tags.get(FOLDER_TAG, ""))
    with suppress(OSError, ValueError):  # the store names the folder, and it may be another user's
        return Outcome.of(folder) if run_id(folder) == identity else None
    return None
