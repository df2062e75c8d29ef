"""Copy runs to another MLflow store, such as a team's server. Each copy exists once, however often it is made.

A copy is recognised by the run's key, which is a tag of it in the other store. The run's folder is not changed: the run
still belongs to its own store. Each part is compared with what the copy has, and only what it lacks is sent. So the
next call completes a copy that was interrupted.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_exp.config.mlflow_settings import DEFAULT_EXPERIMENT
from cifar_exp.errors import TrackingError
from cifar_exp.records.folder_check import check_folder
from cifar_exp.records.journal import read
from cifar_exp.records.run_folder import (
    Outcome,
    RunInfo,
    Status,
    lock_run_folder,
    mark_delivered,
)
from cifar_exp.system.redaction import masked_text
from cifar_exp.tracking.dead_runs import FOLDER_TAG
from cifar_exp.tracking.experiment import mlflow_command
from cifar_exp.tracking.follower import BATCH
from cifar_exp.tracking.local_record import LocalRecord, local_record
from cifar_exp.tracking.mlflow_items import METRICS, PARAMS_OR_TAGS, log_each, with_allowed_names
from cifar_exp.tracking.mlflow_run import MLflowRun, point_count
from cifar_exp.tracking.mlflow_store import KEY_TAG
from cifar_exp.tracking.mlflow_tracker import MLflowTracker
from cifar_exp.tracking.own_store import stored_tracking
from cifar_exp.tracking.store_problems import NoMLflowError, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run


NO_OUTCOME: Status = "KILLED"  # of a run whose folder does not say how it ended


def copier_of(run_dir: Path, address: str, experiment: str | None) -> "Copier":
    """The copier of one run, into the experiment ``experiment`` or, without one, one of the same name as its own.

    Args:
        run_dir: the run's folder, which may come from anybody: the store that it names is not used.
        address: of the other store, as typed.
        experiment: as typed.
    """
    check_folder(run_dir)
    if experiment is None:
        record = local_record(RunInfo.load(run_dir))
        experiment = record.experiment if record else stored_tracking(run_dir).get("experiment")
    return Copier(address, experiment or DEFAULT_EXPERIMENT)


@dataclass(frozen=True)
class Copier(MLflowTracker):
    """Copies runs of this machine to the store at ``uri``. Tags and names that somebody changed there are kept."""

    def deliver(self, run_dir: Path) -> str:
        """Copy a run that has ended; returns one line about it.

        Raises:
            ConfigError: if the run is still training.
            TrackingError: if the store cannot be reached, or the copy was deleted there.
        """
        with lock_run_folder(run_dir):
            run, outcome = RunInfo.load(run_dir), Outcome.of(run_dir)
            entries, record = read(run_dir), local_record(run)
            if record and record.run.info.lifecycle_stage == "deleted":
                return f"{run_dir}: not copied, since the run was deleted in its own store, {record.database}"
            sink = MLflowRun(self, run, restores=False)
            address = masked_text(self.address())
            with store_errors(
                f"--to {address}: {run_dir} could not be copied",
                "Nothing is lost: run the same command again once the store can be reached",
            ):
                sink.open()
                assert sink.run_id
                copy = Copy(self.client(), sink.run_id)
                points = copy.add_record(record) if record else 0
                missing = sink.missing(entries)
                for start in range(0, len(missing), BATCH):
                    sink.write(missing[start : start + BATCH])
                points += point_count(missing)
                is_done = points == 0 and copy.has_ended(outcome)
                files = copy.add_files(sink, record, only_missing=is_done)
                if not is_done:
                    copy.close(outcome)
            mark_delivered(run_dir, self.store())
        return f"{run_dir}: {points} points and {files} files were missing: run {sink.run_id} in {address}"

    def own_run(self, client: "MlflowClient", run: RunInfo) -> RunInfo:  # noqa: ARG002
        """The run itself: the session that trained it belongs to its own store."""
        return run

    def find_run(self, client: "MlflowClient", run: RunInfo) -> str | None:
        """The id of the run's copy, by its key; None if there is none.

        All experiments are searched: a second copy in another one would be a copy too many.
        """
        from mlflow.entities import ViewType

        experiments, token = list[str](), None
        while True:
            page = client.search_experiments(view_type=ViewType.ALL, page_token=token)
            experiments += [str(experiment.experiment_id) for experiment in page]
            token = page.token
            if not token:
                break
        query = f"tags.{KEY_TAG} = '{_key(run)}'"
        found = list(client.search_runs(experiments, query, run_view_type=ViewType.ALL, max_results=10))
        found.sort(key=lambda copy: copy.info.lifecycle_stage == "deleted")
        return str(found[0].info.run_id) if found else None

    def open_run(self, client: "MlflowClient", run: RunInfo, tags: Mapping[str, str], restores: bool = False) -> str:  # noqa: ARG002
        """Start the copy, or find the one that an earlier call started; returns its id.

        Raises:
            TrackingError: the copy was deleted.
        """
        from mlflow.entities import RunTag

        record, identity = local_record(run), self.find_run(client, run)
        if identity is None:
            identity = self._created(client, run, record, tags)
        stored = client.get_run(identity)
        if stored.info.lifecycle_stage == "deleted":
            raise TrackingError(
                f"--to {masked_text(self.address())}: the copy {identity} of {run.run_dir} was deleted there. Restore "
                f"it with {mlflow_command(self.address(), f'runs restore --run-id {identity}')}"
            )
        found = {FOLDER_TAG: str(run.run_dir.resolve()), **run.tags, **(record.tags() if record else {}), **tags}
        new = {name: value for name, value in with_allowed_names(found).items() if name not in stored.data.tags}
        marks = [RunTag(name, value) for name, value in new.items()]
        log_each(marks, PARAMS_OR_TAGS, lambda some: client.log_batch(identity, tags=some), set())
        return identity

    def _created(
        self, client: "MlflowClient", run: RunInfo, record: LocalRecord | None, tags: Mapping[str, str]
    ) -> str:
        name = (record.run.info.run_name if record else None) or run.name
        # The start time and `adopted` tell when each point of the journal was written, so they are there at once.
        start = record.run.info.start_time if record else round(run.started * 1000)
        first = {name: value for name, value in (record.tags() if record else {}).items() if name == "adopted"}
        created = client.create_run(
            self.id_of_experiment(client),
            start_time=start,
            tags={**first, **tags, KEY_TAG: _key(run)},
            run_name=name,
        )
        if not created.info.run_id:
            raise NoMLflowError("the server's answer names no run")
        return str(created.info.run_id)


@dataclass(frozen=True)
class Copy:
    """A copy in the other store."""

    client: "MlflowClient"
    run_id: str

    def add_record(self, record: LocalRecord) -> int:
        """Add params, data sets and points that the run has in its own store. Returns the number of points."""
        from mlflow.entities import Param

        stored, refused = self._stored(), set[str]()
        client: Any = self.client
        params = [Param(name, value) for name, value in record.params().items() if name not in stored.data.params]
        log_each(params, PARAMS_OR_TAGS, lambda some: client.log_batch(self.run_id, params=some), refused)
        known = {_data(one) for one in (stored.inputs.dataset_inputs if stored.inputs else ())}
        datasets = [one for one in record.datasets() if _data(one) not in known]
        if datasets:
            client.log_inputs(self.run_id, datasets=datasets)
        count = 0
        for name, points in record.history():
            there = {_point(point) for point in client.get_metric_history(self.run_id, name)}
            new = [point for point in points if _point(point) not in there]
            log_each(new, METRICS, lambda some: client.log_batch(self.run_id, metrics=some), refused)
            count += len(new)
        return count

    def has_ended(self, outcome: Outcome | None) -> bool:
        """Whether the copy ended as the run did: an earlier call has completed it."""
        info = self._stored().info
        if outcome is None:
            return bool(info.status == NO_OUTCOME)
        return (info.status, info.end_time) == (outcome.status, round(outcome.ended * 1000))

    def add_files(self, sink: MLflowRun, record: LocalRecord | None, only_missing: bool) -> int:
        """Add the files of the run's folder, and those that only its own store has. Returns the number of files sent.

        Args:
            sink: the copy as a sink.
            record: the run in its own store.
            only_missing: whether files of the folder are sent only if the copy has none of that name and size.
        """
        files = sink.artifacts()
        sizes, count = self._sizes(""), 0
        if not only_missing or any(sizes.get(path.name) != path.stat().st_size for path in files):
            sink.store_files()
            sizes, count = self._sizes(""), len(files)
        known = {"": sizes}
        for path, inner in record.files() if record else ():
            if inner not in known:
                known[inner] = self._sizes(inner)
            name = f"{inner}/{path.name}" if inner else path.name
            if name not in known[inner]:
                self.client.log_artifact(self.run_id, str(path), inner or None)
                count += 1
        return count

    def close(self, outcome: Outcome | None) -> None:
        """End the copy as the run ended. This is the last step, so a copy that has ended is complete."""
        ended = round(outcome.ended * 1000) if outcome else None
        self.client.set_terminated(self.run_id, outcome.status if outcome else NO_OUTCOME, ended)

    def _sizes(self, inner: str) -> dict[str, int | None]:
        """Bytes of the copy's files in a folder of it, by path."""
        return {file.path: file.file_size for file in self.client.list_artifacts(self.run_id, inner or None)}

    def _stored(self) -> "Run":
        return self.client.get_run(self.run_id)


def _key(run: RunInfo) -> str:
    """What identifies the run. Folders of early versions have no key; there, facts that never change stand for it."""
    facts = json.dumps([run.name, run.started, dict(run.params)], sort_keys=True, default=str)
    return run.key or hashlib.sha256(facts.encode(errors="surrogatepass")).hexdigest()[:32]


def _point(point: "Metric") -> tuple[int, int, str]:
    return point.step, point.timestamp, repr(point.value)


def _data(one: Any) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    """What identifies the use of a data set: its name, digest, and tags such as the context."""
    return one.dataset.name, one.dataset.digest, tuple(sorted((tag.key, tag.value) for tag in one.tags))
