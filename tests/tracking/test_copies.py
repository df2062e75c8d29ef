"""`cifar-exp sync --to`: runs made offline get one complete copy in another store, and their folders are only data."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag

from cifar_exp.cli.main import run_command
from cifar_exp.config.mlflow_settings import TRACKING_URI
from cifar_exp.records.journal import RUN_ID_FILE, Entry, JournalWriter
from cifar_exp.records.run_folder import CONFIG_FILE, MULTIRUN_FILE, RUN_FILE, Outcome, RunInfo
from cifar_exp.tracking.deliveries import deliver_all
from cifar_exp.tracking.local_record import STORE_TAGS
from tests.helpers.mlflow_runs import all_runs, client
from tests.helpers.servers import relay  # noqa: F401

pytestmark = pytest.mark.usefixtures("store", "no_variable")
SECTION = "tracking: {{_target_: cifar_exp.tracking.mlflow_tracker.MLflowTracker, uri: {uri}, experiment: {name}}}\n"


@pytest.fixture
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACKING_URI, raising=False)


@pytest.fixture
def team(workplace: Path, empty_store: Path) -> str:
    """The address of another SQLite store."""
    (workplace / "team").mkdir()
    shutil.copy(empty_store, workplace / "team" / "mlflow.db")
    return f"sqlite:///{workplace / 'team' / 'mlflow.db'}"


def trained(name: str, uri: str = "null", experiment: str = "widths", **more: Any) -> RunInfo:
    """The folder of a run of three steps that has ended."""
    folder = Path(name)
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(SECTION.format(uri=uri, name=experiment))
    started = time.time() - 1000
    facts: dict[str, Any] = {"artifacts": (CONFIG_FILE,), **more}
    run = RunInfo(f"run {folder.name}", folder, {"model.width": 32}, {"devices": "1"}, started, **facts)
    run.save("hash")
    with JournalWriter(folder) as writer:
        for step in (1, 2, 3):
            writer.write(Entry(step, 1, step / 2, {"loss": 1 / step, "time/total_seconds": float("nan")}))
    Outcome("FINISHED", started + 10).save(folder)
    return run


def tracked(run: RunInfo) -> str:
    """The id of the run in the store of its folder, which has everything now."""
    assert not deliver_all(run.run_dir, {})
    return (run.run_dir / RUN_ID_FILE).read_text().strip()


def sweep() -> Path:
    """The folder of a sweep of two jobs, tracked in the store of the current folder."""
    folder = Path("outputs/multirun/one")
    folder.mkdir(parents=True)
    (folder / MULTIRUN_FILE).write_text(SECTION.format(uri="null", name="widths"))
    parent = RunInfo("sweep one", folder, {}, {"devices": "1,2"}, time.time() - 2000, ("speedup.csv",))
    parent.save_sweep()
    (folder / "speedup.csv").write_text("devices,speedup\n1,1.0\n")
    with JournalWriter(folder) as writer:
        writer.write(Entry(1, 0, 20.0, {"speedup": 1.0}))
    Outcome("FAILED", time.time()).save(folder)
    for number in "01":
        trained(f"{folder}/{number}", sweep_dir=folder)
    assert not deliver_all(folder, {})
    return folder


def content(store: MlflowClient) -> dict[str, Any]:
    """Everything that a store has of each run of these tests, by its name. Ids of runs are replaced by names."""
    ours = [found.experiment_id for found in store.search_experiments() if found.name in ("widths", "a", "b")]
    runs = store.search_runs(ours)
    names = {run.info.run_id: run.info.run_name for run in runs}
    assert len(set(names.values())) == len(runs)
    return {
        str(run.info.run_name): {
            "times": (run.info.status, run.info.start_time, run.info.end_time),
            "parent": names.get(run.data.tags.get("mlflow.parentRunId", "")),
            "tags": {
                name: value
                for name, value in run.data.tags.items()
                if name not in STORE_TAGS and not name.startswith("process.")
            },
            "params": run.data.params,
            "metrics": {
                name: sorted(
                    (m.step, m.timestamp, repr(m.value)) for m in store.get_metric_history(run.info.run_id, name)
                )
                for name in run.data.metrics
            },
            "files": sorted(files(store, run.info.run_id)),
            "data": [(one.dataset.name, one.dataset.digest, one.tags[0].value) for one in run.inputs.dataset_inputs],
            "experiment": store.get_experiment(run.info.experiment_id).name,
        }
        for run in runs
    }


def files(store: MlflowClient, run_id: str, folder: str | None = None) -> Iterator[tuple[str, int | None]]:
    for file in store.list_artifacts(run_id, folder):
        if file.is_dir:
            yield from files(store, run_id, file.path)
        else:
            yield file.path, file.file_size


def edit_in_mlflow(run_id: str) -> None:
    """What users and other programs add to a run: a description, data sets, points, params and files."""
    store = client()
    store.set_tag(run_id, "mlflow.note.content", "the best one")
    store.log_param(run_id, "added", "yes")
    for stamp in (5, 6):
        store.log_metric(run_id, "loss/of_a_colleague", 0.5, timestamp=stamp, step=7)
    data = Dataset("cifar10", "0123abcd", "local", json.dumps({"uri": "data/cifar10"}))
    store.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])
    Path("figure.txt").write_text("a figure")
    store.log_artifact(run_id, "figure.txt", "figures/late")
    store.update_run(run_id, name="my best run")


def test_sweep_made_offline_has_one_complete_copy_on_a_server(relay: Any) -> None:  # noqa: F811
    folder = sweep()
    edit_in_mlflow((folder / "1" / RUN_ID_FILE).read_text().strip())
    own = content(client())
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    server = MlflowClient(relay.address)
    assert run_command(["sync", str(folder / "1"), "--to", relay.address]) == 0  # the parent run comes with it
    assert content(server).keys() == {"my best run", "sweep one"}
    for _ in range(2):
        assert run_command(["sync", "--to", relay.address]) == 0
        assert content(server) == own
    assert own["my best run"]["parent"] == own["run 0"]["parent"] == "sweep one"
    assert own["my best run"]["data"] == [("cifar10", "0123abcd", "training")]
    assert ("figures/late/figure.txt", 8) in own["my best run"]["files"]
    assert own["sweep one"]["times"][0] == "FAILED"
    assert before == {path: path.read_bytes() for path in before}


def test_names_and_tags_that_a_colleague_changed_are_kept(team: str) -> None:
    run = trained("run")
    tracked(run)
    assert not deliver_all(Path("run"), {}, team)
    store = MlflowClient(team)
    (copy,) = all_runs(store)
    store.set_tag(copy.info.run_id, "devices", "eight")
    store.update_run(copy.info.run_id, name="renamed")
    assert not deliver_all(Path("run"), {}, team)
    (copy,) = all_runs(store)
    assert (copy.data.tags["devices"], copy.info.run_name, copy.info.status) == ("eight", "renamed", "FINISHED")


CHANGES = ("create_run", "log_batch", "log_inputs", "log_artifact", "set_terminated")


@contextmanager
def failing(number: int, after: bool) -> Iterator[list[str]]:
    """Call ``number`` of those that change the store raises, before or after it has done its work."""
    calls: list[str] = []

    def wrapped(name: str) -> Callable[..., Any]:
        method = getattr(MlflowClient, name)

        def call(self: MlflowClient, *arguments: Any, **more: Any) -> Any:
            calls.append(name)
            fails = len(calls) == number
            answer = None if fails and not after else method(self, *arguments, **more)
            if fails:
                raise ConnectionError("the cable was pulled")
            return answer

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(MlflowClient, name, wrapped(name))
        yield calls


@pytest.mark.parametrize("after", [False, True])
def test_copy_that_is_interrupted_at_any_call_is_completed_once(team: str, after: bool) -> None:
    identity = tracked(trained("run"))
    edit_in_mlflow(identity)
    own, empty = content(client()), Path("team/mlflow.db").read_bytes()
    with failing(0, after) as all_calls:
        assert not deliver_all(Path("run"), {}, team)
    assert set(all_calls) == set(CHANGES)
    with failing(0, after) as calls:
        assert not deliver_all(Path("run"), {}, team)
    assert calls == []  # nothing is sent again
    for number, name in enumerate(all_calls, start=1):
        target = Path(f"team/{number}/mlflow.db")
        target.parent.mkdir()
        target.write_bytes(empty)
        address = f"sqlite:///{target.resolve()}"
        with failing(number, after):
            (failure,) = deliver_all(Path("run"), {}, address)
        assert failure.exit_code == 5
        assert "could not be copied: the cable was pulled. Nothing is lost" in str(failure)
        assert not deliver_all(Path("run"), {}, address)
        assert content(MlflowClient(address)) == own, f"{name}, call {number}"


def test_run_that_is_resumed_after_its_copy_is_copied_again(team: str) -> None:
    run = trained("run")
    assert not deliver_all(Path("run"), {}, team)  # no store has had it: from its folder alone
    with JournalWriter(Path("run")) as writer:
        writer.write(Entry(4, 2, 2.0, {"loss": 0.1}))
    (Path("run") / CONFIG_FILE).open("a").write("# resumed\n")
    Outcome("KILLED", run.started + 20).save(Path("run"))
    assert not deliver_all(Path("run"), {}, team)
    (copy,) = content(MlflowClient(team)).values()
    start = round(run.started * 1000)
    assert copy["times"] == ("KILLED", start, round((run.started + 20) * 1000))
    assert copy["metrics"]["loss"] == [(step, start + step * 500, repr(1 / step)) for step in (1, 2, 3)] + [
        (4, start + 2000, "0.1")
    ]
    assert copy["files"] == [(CONFIG_FILE, (Path("run") / CONFIG_FILE).stat().st_size)]


def test_folder_of_an_early_version_without_a_key_is_copied_once(team: str) -> None:
    trained("run")
    facts = json.loads(Path("run", RUN_FILE).read_text())
    Path("run", RUN_FILE).write_text(json.dumps({name: value for name, value in facts.items() if name != "key"}))
    for _ in range(2):
        assert not deliver_all(Path("run"), {}, team)
        assert not deliver_all(Path("run"), {})  # its own store gives it an id
    assert len(all_runs(MlflowClient(team))) == 1


def test_second_copy_into_another_experiment_is_not_made(team: str) -> None:
    trained("run")
    for experiment in ("a", "b"):
        assert not deliver_all(Path("run"), {"experiment": experiment}, team)
    assert [run["experiment"] for run in content(MlflowClient(team)).values()] == ["a"]


def test_deleted_copy_is_reported_and_a_deleted_run_is_not_copied(
    team: str, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = tracked(trained("run"))
    assert not deliver_all(Path("run"), {}, team)
    store = MlflowClient(team)
    (copy,) = all_runs(store)
    store.delete_run(copy.info.run_id)
    (failure,) = deliver_all(Path("run"), {}, team)
    assert failure.exit_code == 5
    assert f"mlflow runs restore --run-id {copy.info.run_id}" in str(failure)
    assert store.get_run(copy.info.run_id).info.lifecycle_stage == "deleted"
    client().delete_run(identity)
    capsys.readouterr()
    assert not deliver_all(Path("run"), {}, team)
    assert "run: not copied, since the run was deleted in its own store" in capsys.readouterr().out


def test_store_that_a_folder_names_is_not_contacted(team: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a server was contacted")

    monkeypatch.setattr("socket.socket.connect", refuse)
    trained("run", uri="http://192.0.2.1:5000")
    assert not deliver_all(Path("run"), {}, team)
    assert content(MlflowClient(team))["run run"]["metrics"].keys() == {"loss", "time/total_seconds"}


@pytest.mark.parametrize("has_key", [True, False])
def test_folder_that_names_another_run_of_the_user_reveals_nothing_of_it(team: str, has_key: bool) -> None:
    """A stranger's folder may have any id in it, of the user's own store or of the team's."""
    mine, ours = tracked(trained("mine")), MlflowClient(team)
    edit_in_mlflow(mine)
    theirs = ours.create_run("0", run_name="a colleague's").info.run_id
    for number, identity in enumerate((mine, theirs)):
        run = trained(f"foreign{number}")
        Path(run.run_dir, RUN_ID_FILE).write_text(identity)
        if not has_key:
            facts = json.loads(Path(run.run_dir, RUN_FILE).read_text()) | {"key": ""}
            Path(run.run_dir, RUN_FILE).write_text(json.dumps(facts))
        assert not deliver_all(run.run_dir, {}, team)
    found = {run.info.run_name: run for run in all_runs(ours)}
    assert found.keys() == {"a colleague's", "run foreign0", "run foreign1"}
    assert not found["a colleague's"].data.metrics
    assert found["run foreign0"].data.params == {"model.width": "32"}
    assert "mlflow.note.content" not in found["run foreign0"].data.tags


def test_files_outside_the_runs_own_folder_in_the_store_are_not_sent(team: str) -> None:
    Path("secret").write_text("secret")
    identity = tracked(trained("run"))
    client().log_artifact(identity, "secret", "inner")
    (logged,) = Path("outputs/artifacts").rglob("secret")
    logged.unlink()
    logged.symlink_to(Path("secret").resolve())
    (logged.parent / "folder").symlink_to(Path("outputs").resolve())
    assert not deliver_all(Path("run"), {}, team)
    (copy,) = content(MlflowClient(team)).values()
    assert [name for name, _ in copy["files"]] == [CONFIG_FILE]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--to", "ftp://x"], "--to=ftp://x: it must begin with one of"),
        (["run", "--to", "http://x:1/#/experiments"], "Set --to=http://x:1\n"),
        (["run", "--to", "http://x", "tracking.uri=http://y"], "Leave one of them out"),
        (["nowhere", "--to", "sqlite:///t.db"], "there is no run in this folder"),
        ([], "the run or sweep is missing. Set it to latest"),
    ],
)
def test_wrong_words_are_refused_with_a_remedy(
    words: list[str], message: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained("run")
    assert run_command(["sync", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (workplace / "t.db").exists()
