"""Stores in folders with unusual names, and moved stores: the artifacts are beside the store."""

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cifar_exp.errors import ConfigError
from cifar_exp.tracking.mlflow_store import MLflowStore
from cifar_exp.tracking.store_address import artifact_address, database_of, sqlite_address

NAMES = (
    *("what?", "my%20project", "100%", "a#b", 'it\'s "so"', "a;b", "a=b&c", "co:lon", "@at", "ü", "a\\b", "[1]", "a,b"),
    *("plain", "a b", "${HOME}", "~"),
)


@pytest.mark.parametrize("name", NAMES)
def test_the_address_of_a_file_is_read_as_that_file(tmp_path: Path, name: str) -> None:
    database = tmp_path / name / "mlflow.db"
    assert database_of(sqlite_address(database)) == database


@pytest.mark.parametrize(
    ("address", "database"),
    [
        ("sqlite:///runs.db", Path("runs.db")),
        ("sqlite:////a/runs.db?timeout=9", Path("/a/runs.db")),
        ("sqlite+pysqlite:///runs.db", Path("runs.db")),
        ("sqlite://", None),
        ("sqlite:///:memory:", None),
        ("sqlite:///file:runs.db?uri=true", None),
        ("http://localhost:5000", None),
        ("postgresql://me@there/runs", None),
    ],
)
def test_database_file_of_an_address_is_found(address: str, database: Path | None) -> None:
    assert database_of(address) == database


def logged(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Log a file to a new run in the store of ``project``; returns its path."""
    monkeypatch.chdir(project)
    store = MLflowStore()
    client = store.client()
    run = client.create_run(store.id_of_experiment(client), tags={"folder": str(project / "outputs/a-run")})
    Path("notes.txt").write_text("mine")
    client.log_artifact(run.info.run_id, "notes.txt")
    (found,) = [path for path in project.rglob("notes.txt") if run.info.run_id in path.parts]
    return found


@pytest.fixture
def project(empty_store: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A project folder with an empty store. The test's parameter is the folder's name."""
    folder = tmp_path / getattr(request, "param", "project")
    (folder / "outputs").mkdir(parents=True)
    shutil.copy(empty_store, folder / "outputs")
    return folder


@pytest.mark.parametrize("project", ["what?", "my%20project", 'a#b "c"'], indirect=True)
def test_store_and_artifacts_are_in_the_project_for_any_folder_name(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = logged(project, monkeypatch)
    assert artifact.is_relative_to(project / "outputs/artifacts/cifar-exp")
    assert [path.name for path in project.parent.iterdir()] == [project.name]


def artifacts_of_runs(project: Path) -> set[str]:
    client = MlflowClient(sqlite_address(project / "outputs/mlflow.db"))
    experiment = client.get_experiment_by_name("cifar-exp")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.tags["folder"] for run in runs} == {str(project / "outputs/a-run")}
    for run in runs:
        assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["notes.txt"]
    return {str(run.info.artifact_uri).partition("/cifar-exp/")[0] for run in runs}


def test_moved_project_keeps_its_store_and_artifacts(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After mv, old and new runs have their files in the new folder, and the old one is not created again."""
    logged(project, monkeypatch)
    moved = project.rename(project.with_name("other %41 place"))
    assert logged(moved, monkeypatch).is_relative_to(moved / "outputs/artifacts/cifar-exp")
    assert not project.exists()
    assert artifacts_of_runs(moved) == {(moved / "outputs/artifacts").as_uri()}


def test_chosen_artifact_folder_is_kept(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = project.parent / "disk"
    chosen.mkdir()
    address = artifact_address(chosen / "mlflow.db", "cifar-exp")
    MlflowClient(sqlite_address(project / "outputs/mlflow.db")).create_experiment("cifar-exp", address)
    monkeypatch.chdir(project)
    for made in (False, True):
        if made:
            Path("outputs/artifacts").mkdir(parents=True)
        experiment = MLflowStore().client().get_experiment_by_name("cifar-exp")
        assert experiment
        assert experiment.artifact_location == address


def test_an_address_in_a_missing_folder_is_refused_at_once(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/my%20project/runs.db"
    with pytest.raises(ConfigError, match=r"there is no folder .*/my project\. .*% is written as %25 and \? as %3F"):
        MLflowStore(address)
