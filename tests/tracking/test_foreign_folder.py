"""Runs are sent to a store that the user named or owns, never to one that a foreign folder names."""

import json
import sqlite3
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from cifar_exp.cli.ui import store_address
from cifar_exp.config.mlflow_settings import TRACKING_URI
from cifar_exp.errors import CifarExpError, ConfigError, StorageError, TrackingError
from cifar_exp.records.run_folder import RunInfo
from cifar_exp.tracking.deliveries import deliver_all, tracker_of
from cifar_exp.tracking.mlflow_run import MLflowRun
from cifar_exp.tracking.mlflow_store import MLflowStore
from cifar_exp.tracking.own_store import is_store, sync_command
from cifar_exp.tracking.store_address import artifact_folder

TRACKER = "cifar_exp.tracking.mlflow_tracker.MLflowTracker"


def run_with(uri: str | None, folder: Path = Path("run"), **facts: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    section = {"_target_": TRACKER, "uri": uri, "experiment": "cifar-exp"}
    OmegaConf.save(OmegaConf.create({"tracking": section}), folder / "config.yaml")
    (folder / "run.json").write_text(json.dumps({"name": "run", "params": {}, "tags": {}} | facts))
    return folder


FOREIGN = {
    "a server": "http://example.org:5000",
    "a server on this machine": "http://127.0.0.1:5000",
    "a database server": "postgresql://example.org/runs",
    "another folder's database": "sqlite:////usr/else.db",
    "a database above": "sqlite:///../mlflow.db",
    "its own database": "sqlite:///run/mlflow.db",
    "a database of another program": "sqlite:///other.db",
    "no database": "sqlite:///notes.txt",
    "options": "sqlite:///file:x.db?mode=rwc&uri=true",
    "in memory": "sqlite://",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_store_that_a_folder_names_is_not_used_unless_typed(
    workplace: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TRACKING_URI, raising=False)
    sqlite3.connect("other.db").execute("CREATE TABLE t (x)").connection.close()
    Path("notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in workplace.iterdir()}
    uri = FOREIGN[kind]
    run = run_with(uri)
    with pytest.raises(ConfigError) as refusal:
        tracker_of(run, {})
    assert str(refusal.value).startswith(f"tracking.uri={uri}: the folder run names that store")
    assert "run cifar-exp sync run " in str(refusal.value)
    assert uri in str(refusal.value).partition("cifar-exp sync run")[2]
    assert sync_command(run).endswith(str(refusal.value).partition("cifar-exp sync run")[2])
    if kind != "in memory":
        assert tracker_of(run, {"uri": uri}).uri == uri
    assert before == {path: path.read_bytes() for path in workplace.iterdir() if path.is_file()}


def test_the_users_own_stores_need_no_typing(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACKING_URI, "http://me:word@example.org")
    (store.parent.parent / "runs.db").write_bytes(store.read_bytes())
    assert is_store(store)
    for saved, used in {
        None: "http://me:word@example.org",  # the environment wins over the default
        "http://example.org": "http://me:word@example.org",
        "sqlite:///runs.db": "sqlite:///runs.db",
        "sqlite:///outputs/mlflow.db": "sqlite:///outputs/mlflow.db",
        f"sqlite:///{store}": f"sqlite:///{store}",
        "sqlite:///not-yet.db": "sqlite:///not-yet.db",
    }.items():
        run = run_with(saved)
        assert tracker_of(run, {}).uri == used
        assert sync_command(run).endswith("cifar-exp sync run")


def test_linked_store_counts_as_its_target(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (workplace / "runs.db").symlink_to(tmp_path_factory.mktemp("else") / "runs.db")
    with pytest.raises(ConfigError, match="names that store"):
        tracker_of(run_with("sqlite:///runs.db"), {})


def test_store_inside_the_foreign_folder_is_foreign_too(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_with("sqlite:///mlflow.db", workplace / "run")
    monkeypatch.chdir(workplace / "run")
    with pytest.raises(ConfigError, match="names that store"):
        tracker_of(Path(), {})


@pytest.mark.parametrize(
    "section", ["tracking: [a]", "tracking: {_target_: [a]}", "tracking: {_target_: x.MLflowTracker, uri: [a]}"]
)
def test_tracking_section_with_wrong_types_is_reported(workplace: Path, section: str) -> None:
    run = run_with(None, workplace / "run")
    (run / "config.yaml").write_text(section)
    with pytest.raises(StorageError, match=r"config\.yaml: the run's configuration cannot be read"):
        tracker_of(run, {})


def test_refused_run_is_not_sent_and_others_are(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_with(None, workplace / "all" / "good")
    run_with("http://example.org", workplace / "all" / "foreign")
    run_with(None, workplace / "all" / "names", artifacts=["../../secret"])
    (run_with(None, workplace / "all" / "linked") / "metrics.jsonl").symlink_to("/etc/hostname")
    delivered: list[str] = []

    def deliver(_: object, run_dir: Path) -> str:
        RunInfo.load(run_dir)
        delivered.append(run_dir.name)
        return "delivered"

    monkeypatch.setattr("cifar_exp.tracking.mlflow_tracker.MLflowTracker.deliver", deliver)
    failures: list[CifarExpError] = deliver_all(workplace / "all", {})
    assert delivered == ["good"]
    assert capsys.readouterr().out == "delivered\n"
    assert [type(failure) for failure in failures] == [ConfigError, StorageError, StorageError]
    messages = "\n".join(map(str, failures))
    assert "metrics.jsonl: it is a link" in messages
    assert "artifacts.0=../../secret: " in messages


def test_linked_file_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    run = run_with(None, tmp_path / "run", artifacts=["config.yaml", "notes.txt", "pictures", "absent"])
    (run / "notes.txt").symlink_to(tmp_path / "secret")
    (run / "pictures").mkdir()
    assert MLflowRun(MLflowStore(), RunInfo.load(run)).artifacts() == [run / "config.yaml"]


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        (None, "/home/me/.ssh"),
        (None, "file:///home/me/project/conf"),
        (None, "s3://bucket/ab12/artifacts"),
        (None, "ftp://example.org/ab12/artifacts"),
        ("http://example.org", "/home/me/.ssh"),
        ("sqlite:///x.db", "/x/another/artifacts"),
    ],
)
def test_store_cannot_choose_the_folder_for_files(tmp_path: Path, uri: str | None, place: str) -> None:
    sink = MLflowRun(MLflowStore(uri), RunInfo("run", tmp_path, {}, {}, 0.0))
    sink.run_id, sink._place = "ab12", place
    with pytest.raises(TrackingError, match=r"at .*, which is not the run's own folder") as refusal:
        sink._check_place()
    assert place in str(refusal.value)
    assert sink.is_final(refusal.value)
    for own in ("file:///x/artifacts/e/ab12/artifacts", "/x/ab12/artifacts", "mlflow-artifacts:/1/ab12/artifacts"):
        sink._place = own
        sink._check_place()


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "..", ".", "a/b", "a\0b", "\\x"])
def test_artifacts_are_beside_the_store_for_any_experiment_name(tmp_path: Path, name: str) -> None:
    found = artifact_folder(tmp_path, name)
    assert found.resolve().parent == tmp_path / "artifacts"
    assert artifact_folder(tmp_path, "my runs") == tmp_path / "artifacts" / "my runs"


@pytest.mark.parametrize("table", ["experiments", "runs"])
@pytest.mark.parametrize(
    "place",
    [
        *(
            "s3://bucket/x",
            "http://example.org/x",
            "ftp://example.org/x",
            "file://example.org/x",
            "mlflow-artifacts://h/x",
        ),
        *("/etc", "file:///etc", "file:///etc/", "{folder}/../../../../../../../../etc", "file:///%65tc", "dbfs:/x"),
    ],
)
def test_ui_shows_no_files_outside_the_stores_folder(workplace: Path, place: str, table: str) -> None:
    place = place.format(folder=workplace)
    assert store_address(f"sqlite:///{database_with(workplace, table, None)}")
    with pytest.raises(ConfigError, match="outside its folder, and the UI would show") as refusal:
        store_address(f"sqlite:///{database_with(workplace, table, place)}")
    assert place in str(refusal.value)


def test_ui_shows_files_beside_the_store_and_of_a_moved_store(workplace: Path) -> None:
    for place in (
        f"file://{workplace}/artifacts/1",
        str(workplace / "artifacts"),
        "mlflow-artifacts:/1",
        "/gone/x",
        "",
    ):
        assert store_address(f"sqlite:///{database_with(workplace, 'experiments', place)}")


def database_with(folder: Path, table: str, place: str | None) -> Path:
    path = folder / "store" / "mlflow.db"
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    column = {"experiments": "artifact_location", "runs": "artifact_uri"}[table]
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE experiments (artifact_location TEXT)")
        connection.execute("CREATE TABLE runs (artifact_uri TEXT)")
        connection.execute(f"INSERT INTO {table} ({column}) VALUES (?)", [place])
    connection.close()
    return path
