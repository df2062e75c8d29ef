"""A run is found by its folder, its MLflow id or as the latest; if there is none, the message says what to set."""

import os
from pathlib import Path

import pytest

from cifar_exp.errors import ConfigError
from cifar_exp.records.find_run import find_folder, find_run, find_runs
from cifar_exp.records.run_folder import RUN_FILE, SWEEP_RUN_FILE


@pytest.fixture
def runs(workplace: Path) -> Path:
    """Two runs: the older one has a checkpoint, the newer one has none yet."""
    for age, name in ((200, "old"), (100, "new")):
        folder = workplace / "outputs" / name
        folder.mkdir(parents=True)
        (folder / "run.json").touch()
        (folder / "mlflow_run_id").write_text(f"id-{name}\n")
        os.utime(folder / "run.json", (1000 - age, 1000 - age))
    (workplace / "outputs" / "old" / "checkpoints").mkdir()
    (workplace / "outputs" / "old" / "checkpoints" / "step-00000001.json").touch()
    (workplace / "outputs" / "new" / "checkpoints").mkdir()
    (workplace / "outputs" / "new" / "checkpoints" / "notes.json").touch()  # the user's
    (workplace / "outputs" / "mine" / "mlflow_run_id").mkdir(parents=True)
    (workplace / "outputs" / "mine" / "run.json").mkdir()
    return Path("outputs")


def test_a_run_is_found_by_folder_id_and_as_the_latest(runs: Path) -> None:
    assert find_run("outputs/old") == runs / "old"
    assert find_run("id-new", "resume") == runs / "new"
    assert find_run("latest", "resume") == runs / "new"
    assert find_run("latest", with_checkpoint=True) == runs / "old"


@pytest.mark.parametrize("name", ["nowhere", "id-other", "x" * 300])
def test_unknown_run_message_has_a_remedy(runs: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"resume={name}: there is no such run under {runs}/\. Set resume= to never"):
        find_run(name, "resume")


def test_latest_needs_a_run(workplace: Path) -> None:  # noqa: ARG001
    with pytest.raises(ConfigError, match="run=latest: there is no run with a checkpoint under outputs/ yet"):
        find_run("latest", with_checkpoint=True)


def test_sweep_is_found_by_folder_or_refused(runs: Path) -> None:
    assert find_folder("latest", SWEEP_RUN_FILE) is None
    (runs / "old" / "sweep_run.json").touch()
    assert find_folder("latest", SWEEP_RUN_FILE) == find_folder("id-old", SWEEP_RUN_FILE) == runs / "old"
    assert find_folder("id-new", SWEEP_RUN_FILE) is None


def test_report_and_sync_accept_folders_of_runs_and_sweeps(runs: Path) -> None:
    assert find_runs("outputs", SWEEP_RUN_FILE) == runs
    assert find_runs("latest", SWEEP_RUN_FILE) == Path("latest")
    assert find_runs("x" * 300, SWEEP_RUN_FILE) == Path("x" * 300)
    (runs / "old" / SWEEP_RUN_FILE).touch()
    for name in ("latest", "id-old", "outputs/old"):
        assert find_runs(name, SWEEP_RUN_FILE) == runs / "old"
    for name in ("latest", "id-new"):
        assert find_runs(name, RUN_FILE, SWEEP_RUN_FILE) == runs / "new"
    assert find_runs("id-new", SWEEP_RUN_FILE) == Path("id-new")
