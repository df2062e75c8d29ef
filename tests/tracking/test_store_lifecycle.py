"""Experiments and runs that other processes created or deleted, and stores that cannot be written."""

import errno
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from cifar_exp.errors import TrackingError
from cifar_exp.records.journal import RUN_ID_FILE, Entry
from cifar_exp.records.run_folder import CONFIG_FILE, RunInfo
from cifar_exp.tracking.deliveries import deliver_all
from cifar_exp.tracking.follower import undelivered_message
from cifar_exp.tracking.mlflow_run import MLflowRun
from cifar_exp.tracking.mlflow_tracker import MLflowTracker
from cifar_exp.tracking.store_problems import is_permanent

pytestmark = pytest.mark.usefixtures("store")


def info(name: str, **more: Any) -> RunInfo:
    folder = Path(name)
    folder.mkdir()
    (folder / CONFIG_FILE).write_text("tracking: {_target_: cifar_exp.tracking.mlflow_tracker.MLflowTracker}\n")
    run = RunInfo("a run", folder, {"lr": 0.1}, {"devices": "1"}, time.time(), **more)
    run.save("hash")
    return run


def opened(tracker: MLflowTracker, run: RunInfo) -> MLflowRun:
    sink = tracker.sink(run)
    sink.open()
    return sink


def test_experiment_created_concurrently_is_used() -> None:
    store = MLflowTracker().client()
    create = MlflowClient.create_experiment

    def slower(self: MlflowClient, *arguments: Any, **more: Any) -> Any:
        create(self, *arguments, **more)
        return create(self, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "create_experiment", slower)
        MLflowTracker(experiment="raced").client()
    found = store.get_experiment_by_name("raced")
    assert found is not None
    store.delete_experiment(found.experiment_id)
    with pytest.raises(TrackingError, match=f"experiments restore --experiment-id {found.experiment_id}"):
        MLflowTracker(experiment="raced").client()


def test_deleted_run_is_restored_by_resume_and_not_by_sync(capsys: pytest.CaptureFixture[str]) -> None:
    tracker = MLflowTracker()
    run = info("run")
    identity = opened(tracker, run).run_id
    assert identity
    store = tracker.client()
    store.delete_run(identity)
    (failure,) = deliver_all(Path("run"), {})
    assert failure.exit_code == 5
    assert f"runs restore --run-id {identity}" in str(failure)
    assert store.get_run(identity).info.lifecycle_stage == "deleted"
    assert opened(tracker, run).run_id == identity
    assert store.get_run(identity).info.lifecycle_stage == "active"
    assert "was deleted in MLflow and is restored" in capsys.readouterr().err


def test_an_existing_run_is_continued_by_one_run_alone(capsys: pytest.CaptureFixture[str]) -> None:
    store = MLflowTracker().client()
    experiment = store.get_experiment_by_name("cifar-exp")
    assert experiment is not None
    given = store.create_run(experiment.experiment_id, run_name="given", start_time=1000).info.run_id
    tracker = MLflowTracker(run_id=given, run_name="named")
    child = opened(tracker, info("child", sweep_dir=Path("sweep")))
    assert child.run_id != given
    assert store.get_run(child.run_id).info.run_name == "a run"
    sink = opened(tracker, info("run"))
    sink.write([Entry(1, 1, 0.5, {"loss": 1.0})])
    sink.close("FINISHED")
    assert sink.run_id == given == Path("run", RUN_ID_FILE).read_text().strip()
    record = store.get_run(given)
    assert (record.info.run_name, record.info.status, record.data.params) == ("named", "FINISHED", {"lr": "0.1"})
    (point,) = store.get_metric_history(given, "loss")
    assert point.timestamp / 1000 == pytest.approx(time.time(), abs=600)  # relative to its own start
    for number, (wrong, words) in enumerate(
        {given: "another run has continued", "0" * 32: "no such run", "no id!": "no such run"}.items()
    ):
        assert opened(MLflowTracker(run_id=wrong), info(f"other{number}")).run_id != given
        assert words in capsys.readouterr().err


def test_an_experiment_is_found_by_its_id() -> None:
    store = MLflowTracker().client()
    made = store.create_experiment("by id")
    tracker = MLflowTracker(experiment_id=made)
    assert tracker.id_of_experiment(tracker.client()) == made
    uri = f"sqlite:///{Path('outputs/mlflow.db').resolve()}"
    with pytest.raises(TrackingError, match=r"experiment_id=99: .* has no such experiment. Set tracking.experiment"):
        MLflowTracker(uri, experiment_id="99").client()
    default = MLflowTracker(experiment_id="99")  # an id in MLflow's default store
    experiment = store.get_experiment_by_name("cifar-exp")
    assert experiment is not None
    assert default.id_of_experiment(default.client()) == experiment.experiment_id


def test_file_that_cannot_be_stored_does_not_affect_metrics() -> None:
    sink = opened(MLflowTracker(), info("run", artifacts=(CONFIG_FILE, "run.json")))
    assert sink.run_id
    log = MlflowClient.log_artifact

    def read_only(self: MlflowClient, run_id: str, path: str) -> None:
        if path.endswith(CONFIG_FILE):
            raise OSError(errno.EROFS, "Read-only file system")
        log(self, run_id, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", read_only)
        with pytest.raises(TrackingError, match=r"config\.yaml cannot be stored at .*Let this user write there"):
            sink.close("FINISHED")
    store = MLflowTracker().client()
    assert [file.path for file in store.list_artifacts(sink.run_id)] == ["run.json"]
    assert store.get_run(sink.run_id).info.status == "FINISHED"


def test_missing_database_driver_is_named() -> None:
    with pytest.raises(TrackingError, match=r"mysql://host/x: MLflow needs the Python module MySQLdb") as caught:
        MLflowTracker("mysql://me:hush@host/x").client()
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("revision", "words"),
    [("abcdefabcdef", "A newer MLflow has made that store"), ("0584bdc529eb", "mlflow db upgrade")],
)
def test_store_of_another_mlflow_version_is_reported_with_a_remedy(store: Path, revision: str, words: str) -> None:
    other = store.with_name("other.db")
    other.write_bytes(store.read_bytes())
    with sqlite3.connect(other) as connection:
        connection.execute(f"UPDATE alembic_version SET version_num = '{revision}'")
    connection.close()
    with pytest.raises(Exception, match="schema") as caught:
        MLflowTracker(f"sqlite:///{other}").client()
    assert is_permanent(caught.value)
    messages = undelivered_message(caught.value, Path("run"))
    assert words in messages
    assert ("upgrade" in messages) == (words == "mlflow db upgrade")


def test_sync_sends_intact_runs_and_skips_damaged_ones(capsys: pytest.CaptureFixture[str]) -> None:
    Path("all").mkdir()
    for name in ("all/0", "all/1", "all/2", "all/3"):
        info(name)
    Path("all/0/run.json").write_text("{")
    Path("all/1", CONFIG_FILE).write_text("[")
    Path("all/2/metrics.jsonl").write_bytes(b"\xff\xfe\n{}\n")
    failures = deliver_all(Path("all"), {})
    assert [str(failure).split(":")[0].rsplit("/", 1)[0] for failure in failures][:2] == ["all/0", "all/1"]
    assert all("this is a bug" not in str(failure) for failure in failures[:2])
    assert "all/3: 0 of 0 points were missing" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"])
def test_a_variable_that_mlflow_cannot_read_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "abc")
    with pytest.raises(TrackingError, match=f"^{name}=abc: .* Correct or unset it$") as caught:
        MLflowTracker().client()
    assert is_permanent(caught.value), "another try reads the same"
