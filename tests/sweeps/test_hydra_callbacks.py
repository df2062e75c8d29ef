"""Features that Hydra's users rely on: callbacks, Hydra's own config groups, and messages about typing errors."""

import shlex
from pathlib import Path

import pytest
from omegaconf import DictConfig

from cifar_exp.cli.hydra_app import run_hydra
from cifar_exp.cli.train import check, run_job
from cifar_exp.config import hydra_versions
from cifar_exp.errors import ConfigError, Stopped, StorageError
from cifar_exp.runs.context import RunContext
from tests.conftest import TINY, Command

NOTES = """
from pathlib import Path
from hydra.experimental.callback import Callback

class Notes(Callback):
    def _note(self, name, job_return=None):
        failure = job_return and job_return._return_value
        with Path("notes").open("a") as file:
            file.write(f"{name} {job_return.status.name} {type(failure).__name__}\\n" if job_return else f"{name}\\n")
    def on_run_end(self, config, job_return, **_): self._note("on_run_end", job_return)
    def on_job_end(self, config, job_return, **_): self._note("on_job_end", job_return)
    def on_multirun_end(self, config, **_): self._note("on_multirun_end")
"""
WITH_NOTES = "+hydra.callbacks.notes._target_=cifar_exp_test_notes.Notes"


@pytest.fixture
def notes(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a user's callback writes."""
    (workplace / "cifar_exp_test_notes.py").write_text(NOTES)
    monkeypatch.syspath_prepend(str(workplace))
    monkeypatch.setattr("cifar_exp.cli.hydra_app.ALLOWED_TARGETS", ("cifar_exp.*", "cifar_exp_test_notes.*"))
    monkeypatch.setattr("sys.argv", ["cifar-exp"])
    return workplace / "notes"


def refuse(*_: object) -> float:
    raise ConfigError("model.width=3: refused by the test")


def stop(*_: object) -> float:
    raise Stopped(15)


def break_off(composed: DictConfig, _: RunContext) -> float:
    if composed.seed == 1:
        raise StorageError("the disk of the test")
    return 0.5


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"cifar_exp_test_notes.py", "notes", "__pycache__"}


def test_callbacks_get_the_refusal_of_a_run_and_no_files_are_left(
    notes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_hydra(refuse, [WITH_NOTES]) == 2
    assert notes.read_text().splitlines() == ["on_job_end FAILED ConfigError", "on_run_end FAILED ConfigError"]
    assert capsys.readouterr().err == "cifar-exp: model.width=3: refused by the test\n"
    assert left(notes.parent) == set()


def test_folders_and_files_that_were_there_before_a_refusal_stay(notes: Path) -> None:
    mine = notes.parent / "mine"
    mine.mkdir()
    (mine / "cifar-exp.log").write_text("of mine")
    assert run_hydra(refuse, ["hydra.run.dir=mine", "hydra.output_subdir=.hydra"]) == 2
    assert {path.name: path.read_text() for path in mine.iterdir()} == {"cifar-exp.log": "of mine"}
    (notes.parent / "empty").mkdir()
    assert run_hydra(refuse, ["hydra.run.dir=empty/new/run"]) == 2
    assert list((notes.parent / "empty").iterdir()) == []


@pytest.mark.parametrize("words", [(), ("-m", "seed=0,1")])
def test_callbacks_get_the_signal_that_ends_a_run_or_a_sweep(notes: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(Stopped, match="15"):
        run_hydra(stop, [*words, WITH_NOTES, "tracking=none", "progress=quiet"])
    end = "on_multirun_end" if words else "on_run_end FAILED StoppedJobError"
    assert notes.read_text().splitlines() == ["on_job_end FAILED StoppedJobError", end]


def test_callbacks_get_the_outcome_of_each_job(notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-m", "seed=0,1,2", WITH_NOTES, "tracking=none", "progress=quiet"]
    assert run_hydra(break_off, words) == 8
    assert notes.read_text().splitlines() == [
        *("on_job_end COMPLETED float", "on_job_end FAILED StorageError", "on_job_end COMPLETED float"),
        "on_multirun_end",
    ]
    assert capsys.readouterr().err == "cifar-exp: job 1 failed: the disk of the test\n"


def test_sweep_of_refused_jobs_leaves_no_files(notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_hydra(refuse, ["-m", "seed=0,1"]) == 2  # as the jobs begin
    assert left(notes.parent) == set()
    capsys.readouterr()
    assert run_hydra(refuse, ["-m", "model.depth=0,-1"], check) == 2  # before the first one
    assert capsys.readouterr().err == "cifar-exp: model.depth=0: it must be 1 or more. Set model.depth=1\n"
    assert left(notes.parent) == set()


def test_more_than_one_mps_rank_refuses_a_sweep_once(
    notes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert run_hydra(refuse, ["-m", "devices=mps", "devices.count=1,2"], check) == 4
    assert capsys.readouterr().err.count("Apple's GPU takes one rank") == 1
    assert left(notes.parent) == set()


def test_missing_image_folder_is_reported_before_heavy_imports(
    notes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cifar_exp.system.surroundings.set_up_environment", pytest.fail)
    assert run_hydra(run_job, ["data=folders", "data.root=nowhere"]) == 3
    assert "data.root=nowhere: there is no folder nowhere" in capsys.readouterr().err
    assert left(notes.parent) == set()


@pytest.mark.parametrize("choice", ["disabled", "none", "stdout", "default", "run_log"])
def test_hydras_choices_of_logging_work(notes: Path, choice: str) -> None:
    assert run_hydra(lambda *_: 0.5, [f"hydra/job_logging={choice}", "hydra.run.dir=run"]) == 0
    logs = {path.name for path in (notes.parent / "run").glob("*.log")}
    assert logs == ({"cifar-exp.log"} if choice in ("default", "run_log") else set())


def test_jobs_keep_the_working_folder_despite_hydra_job_chdir(notes: Path) -> None:
    seen: list[Path] = []
    words = ["-m", "seed=0,1", "hydra.job.chdir=true", "tracking=none", "progress=quiet"]
    assert run_hydra(lambda *_: seen.append(Path.cwd()), words) == 0
    assert seen == [notes.parent] * 2


def test_experimental_rerun_repeats_a_job(cifar_exp: Command, workplace: Path) -> None:
    """Hydra 1.3 keeps a pickled configuration, and the new run gets a new folder; Hydra 1.4 keeps overrides."""
    is_old = not hydra_versions._LIMITS_TARGETS
    pickled = ["+hydra.callbacks.p._target_=hydra.experimental.callbacks.PickleJobInfoCallback"] if is_old else []
    run = [*TINY, "train.epochs=1", "tracking=none", "progress=quiet", "hydra.output_subdir=.hydra"]
    assert cifar_exp(*run, *pickled).returncode == 0
    (kept,) = workplace.rglob("config.pickle" if is_old else ".hydra")
    again = cifar_exp("--experimental-rerun", *([str(kept)] if is_old else [str(kept.parent), "hydra.run.dir=again"]))
    assert again.returncode == 0, again.stderr
    runs = list(workplace.rglob("run.json"))
    assert len({path.parent for path in runs}) == 2
    assert len({(path.parent / "config.yaml").read_text() for path in runs}) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--epochs 5", "--epochs: a setting is written without dashes, as key=value. Set train.epochs=5"),
        ("--batch-size=64", "Set train.batch_size=64"),
        ("-m --width 8", "Set model.width=8"),
        ("--multirnu", "Did you mean --multirun?"),
        ("devices.count=1,2", "devices.count=1,2: several values are a sweep. Add -m to sweep, as in cifar-exp -m"),
        ("seed=range(3)", "Add -m to sweep"),
        ("-m optimizer.lr=interval(0,1)", "Set optimizer.lr=a,b,c"),
        ("--config-name other", "--config-name=other: there is no such file"),
        ("--config-path /nowhere", "--config-path=/nowhere: there is no such folder"),
        ("--config-path mine", "--config-path=mine: it has no config.yaml"),
        ("--config-dir nowhere", "--config-dir=nowhere: there is no such folder"),
        ("--experimental-rerun nowhere", "--experimental-rerun=nowhere: it cannot be read"),
        ("--config-dir mine experiment=no_package", "its file sets experiment.train instead of train"),
        ("--config-dir mine experiment=listed", "experiment: its file is not a preset"),
        ("--config-dir mine experiment=indent", 'indent.yaml", line 4, column 14'),
        ("--config-dir mine experiment=latin", "latin.yaml: the file is not in UTF-8"),
        ("--config-dir mine experiment=refers", "'experiment/refers': Could not"),
        ("tracking.experiment=2024", """In a shell, write 'tracking.experiment="2024"'"""),
        ("data.root=/a/lr=0.1", """In a shell, write 'data.root="/a/lr=0.1"'"""),
        ("data.root=[1,2", "Write a list as [a,b]"),
    ],
)
@pytest.mark.filterwarnings("ignore:Experimental rerun")
def test_invalid_command_line_is_reported_with_a_remedy(
    notes: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str
) -> None:
    presets = notes.parent / "mine" / "experiment"
    presets.mkdir(parents=True)
    (presets / "no_package.yaml").write_text("train:\n  epochs: 1\n")
    (presets / "listed.yaml").write_text("- a\n- b\n")
    (presets / "indent.yaml").write_text("# @package _global_\ntrain:\n  epochs: 1\n   batch_size: 3\n")
    (presets / "latin.yaml").write_bytes("# @package _global_\n# größe\n".encode("latin-1"))
    (presets / "refers.yaml").write_text("defaults:\n  - nothing\n")
    assert run_hydra(run_job, shlex.split(words), check) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "Traceback" not in message
    assert "bug" not in message
    assert left(notes.parent) == {"mine"}
