"""A bug is reported as a bug, and a wrong setting is not blamed for it."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from cifar_exp.config import hydra_errors
from cifar_exp.config.hydra_errors import causing_words, explained
from cifar_exp.config.reading import register_resolvers
from cifar_exp.errors import ConfigError, DataError, StorageError
from cifar_exp.system import bugs, supported
from cifar_exp.system.bugs import BugError, as_user_error, is_bug
from cifar_exp.tracking.follower import undelivered_message
from cifar_exp.tracking.store_problems import shortened_error
from tests.conftest import REPO, environment, the_run

TINY = (
    *("data=synthetic", "data.train_count=64", "data.test_count=32", "model.width=2", "model.depth=1"),
    *("train.epochs=1", "train.batch_size=32", "devices=cpu", "devices.count=1", "train.compile=never"),
)
BOOM = "def boom(*_, **__): raise {}('the flux capacitor is empty')\n"


def run(folder: Path, patch: str, *arguments: str, command: str = "train") -> subprocess.CompletedProcess[str]:
    """A command whose package is patched before it starts."""
    code = f"import sys\n{patch}\nfrom cifar_exp.cli.entry import main\nmain()"
    variables = environment() | {"TMPDIR": str(folder)}
    words = [sys.executable, "-c", code, command, *arguments]
    return subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=280)


def kept(errors: str) -> str:
    """What the file holds that the message names."""
    (place,) = re.findall(r"traceback is in (.*)$", errors, re.MULTILINE)
    return Path(place).read_text()


def assert_reported_as_a_bug(done: subprocess.CompletedProcess[str], code: int, kind: str) -> None:
    assert done.returncode == code, done.stderr
    assert f"this is a bug, not a mistake in what was typed: {kind}: the flux capacitor is empty" in done.stderr
    assert "Traceback" not in done.stderr
    assert "hydra-core 1." in done.stderr
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in done.stderr
    content = kept(done.stderr)
    assert f"{kind}: the flux capacitor is empty" in content
    assert "boom" in content


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        (
            "from hydra.core.override_parser.overrides_parser import OverridesParser as O; O.parse_overrides",
            "TypeError",
        ),
        ("import hydra.main as _; sys.modules['hydra.main'].get_args_parser", "ValueError"),
        ("import hydra._internal.config_loader_impl as c; c.ConfigLoaderImpl._load_configuration_impl", "ValueError"),
        ("import cifar_exp.config.reading as c; c._validated", "TypeError"),
        ("import cifar_exp.config.reading as c; c.register_resolvers", "AttributeError"),
        ("import cifar_exp.cli.train as m; m.run_job", "KeyError"),
    ],
)
def test_bug_is_not_reported_as_a_user_error(place: str, kind: str, tmp_path: Path) -> None:
    patch = f"{BOOM.format(kind)}{place} = boom"
    done = run(tmp_path, patch, "train.epochs=2", "seed=1")
    if kind == "KeyError":  # its text is in quotes
        done.stderr = done.stderr.replace("'the flux capacitor is empty'", "the flux capacitor is empty")
    assert done.returncode == 1, done.stderr
    assert f"this is a bug, not a mistake in what was typed: {kind}: the flux capacitor is empty" in done.stderr
    assert "Traceback" not in done.stderr
    assert "train.epochs=2" not in done.stderr
    assert "boom" in kept(done.stderr)


def test_traceback_of_a_job_is_in_its_log(tmp_path: Path) -> None:
    done = run(tmp_path, f"{BOOM.format('TypeError')}import cifar_exp.runs.components as c; c.build = boom", *TINY)
    assert_reported_as_a_bug(done, 1, "TypeError")
    (log,) = tmp_path.rglob("cifar-exp.log")
    assert "the flux capacitor is empty" in log.read_text()


def test_bug_in_a_sweep_is_reported_per_job_and_other_jobs_train(tmp_path: Path) -> None:
    done = run(
        tmp_path, f"{BOOM.format('TypeError')}import cifar_exp.runs.components as c; c.build = boom", "-m", "seed=1,2"
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("failed: this is a bug, not a mistake in what was typed: TypeError") == 2
    assert "failed (1): this is a bug" in " ".join(done.stdout.replace("│", " ").split())


def test_figure_error_is_not_reported_as_a_full_disk(tmp_path: Path) -> None:
    patch = f"{BOOM.format('ImportError')}import cifar_exp.display.training_figure as f; f.draw_training = boom"
    done = run(tmp_path, patch, *TINY, "tracking=none")
    assert_reported_as_a_bug(done, 1, "ImportError")
    assert "training finished and nothing is lost, but its page or figure was not drawn" in done.stderr
    assert "Free space" not in done.stderr
    assert (the_run(tmp_path) / "model.safetensors").exists()


def test_bug_in_the_tracker_client_is_not_reported_as_an_outage(tmp_path: Path) -> None:
    patch = f"{BOOM.format('TypeError')}import mlflow; mlflow.MlflowClient.log_artifact = boom"
    done = run(tmp_path, patch, *TINY)
    assert_reported_as_a_bug(done, 5, "TypeError")
    assert "training finished and nothing is lost" in done.stderr
    assert "Once that is fixed, run" in done.stderr
    assert "reached" not in done.stderr
    assert "unreachable" not in done.stderr


def test_other_commands_report_bugs_too(tmp_path: Path) -> None:
    patch = f"{BOOM.format('TypeError')}import cifar_exp.tracking.deliveries as s; s.runs_in = boom"
    assert_reported_as_a_bug(run(tmp_path, patch, ".", command="sync"), 1, "TypeError")


def test_import_error_is_reported_by_the_entry_point(tmp_path: Path) -> None:
    done = run(tmp_path, "sys.modules['torch'] = None", "latest", "x.png", command="predict")
    assert done.returncode == 1
    assert "cifar-exp: this is a bug, not a mistake in what was typed: ModuleNotFoundError" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("word", ["data=null", "model=[[1]]", "+data=[[]]"])
def test_arguments_that_crash_hydra_are_named(word: str, tmp_path: Path) -> None:
    """Hydra raises, say, a ``TypeError`` because of one argument, and nothing without it."""
    done = run(tmp_path, "", "train.epochs=2", word)
    assert done.returncode == 2, done.stderr
    assert word.lstrip("+") in done.stderr
    assert "train.epochs=2" not in done.stderr
    assert "bug" not in done.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("hydra.job_logging.root.level=nonsense",), "hydra.job_logging.root.level=nonsense"),
        (("-m", "hydra.sweep.dir=${nothing}", "seed=1,2"), "nothing"),
        (("--cfg", "job", "--run"), "--cfg"),
        (("--resolve",), "--resolve"),
        (("--config-dir", "nowhere"), "nowhere"),
        (("hydra/launcher=nonsense", "-m"), "nonsense"),
        (("hydra.launcher._target_=nonsense", "-m"), "hydra.launcher._target_=nonsense"),
    ],
)
def test_invalid_hydra_settings_and_flags_are_named(words: tuple[str, ...], named: str, tmp_path: Path) -> None:
    done = run(tmp_path, "", *words)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert "bug" not in done.stderr


def test_users_invalid_yaml_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "broken.yaml").write_text("width: [1\ndepth: }")
    done = run(tmp_path, "", "--config-dir", "mine", "model=broken")
    assert done.returncode == 2, done.stderr
    assert "broken.yaml" in done.stderr
    assert "bug" not in done.stderr


def test_bug_is_not_blamed_on_the_rerun_file() -> None:
    typed = ["--experimental-rerun", "kept"]
    with pytest.raises(AttributeError) as bug:
        causing_words(None, 1)  # type: ignore[arg-type]
    assert explained(bug.value, typed) is None
    assert str(explained(FileNotFoundError("kept"), typed)).startswith("--experimental-rerun=kept: it cannot be read")


def test_cause_of_an_error_is_found_by_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    register_resolvers()
    typed = ["seed=3", "data=null", "-m"]
    assert hydra_errors._fails_alike(ValueError(), ["data=null"])
    assert not hydra_errors._fails_alike(TypeError(), ["data=null"])
    assert explained(ValueError("elsewhere"), typed) is None  # Hydra has not raised it
    monkeypatch.setattr(hydra_errors, "origin", lambda *_: "hydra")
    assert causing_words(ValueError(), typed) == ["data=null"]
    assert causing_words(TypeError(), typed) == []

    def fail(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr(OverridesParser, "parse_overrides", fail)
    assert causing_words(ValueError(), typed) == []  # it fails without them, too


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (TypeError("x"), True),
        (ImportError("x"), True),
        (RecursionError(), True),
        (ConnectionRefusedError(), False),
        (MemoryError(), False),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "x"), False),
        (ConfigError("x"), False),
    ],
)
def test_pythons_own_exceptions_are_bugs(error: Exception, expected: bool) -> None:
    assert is_bug(error) == expected


def test_errors_of_the_operating_system_are_not_bugs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bugs.tempfile, "tempdir", str(tmp_path))
    refused = as_user_error(PermissionError(13, "Permission denied", "there"))
    assert isinstance(refused, StorageError)
    assert str(refused).startswith("there: Permission denied")
    assert isinstance(as_user_error(FileNotFoundError(2, "No such file", "there")), BugError)
    lasting = DataError("x")
    assert as_user_error(lasting) is lasting


def test_a_traceback_that_cannot_be_kept_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bugs, "_logs", lambda: iter(()))
    monkeypatch.setattr(bugs.tempfile, "tempdir", "/nowhere")
    assert "could not be kept:\nTypeError: token=***" in str(BugError(TypeError("token=abc")))


def test_bug_in_a_tracker_is_reported() -> None:
    assert shortened_error(TypeError("a\nb")) == "TypeError: a b"
    assert "Once the tracker can be reached" in undelivered_message(ConnectionError("away"), Path("run"))
    assert "Once that is fixed" in undelivered_message(TypeError("x"), Path("run"))


@pytest.mark.parametrize("version", [(3, 8, 1), (3, 10, 13), (3, 15, 0), (4, 0, 0)])
def test_another_python_is_refused_by_name(version: tuple[int, ...], capsys: pytest.CaptureFixture[str]) -> None:
    message = supported.refusal(version, "linux")
    assert f"this is Python {version[0]}.{version[1]} (" in message
    assert "needs 3.11 to 3.14" in message
    assert "\n" not in message
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "version_info", version)
        with pytest.raises(SystemExit) as ended:
            supported.refuse_others()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"cifar-exp: {message}\n"


def test_the_pythons_of_the_matrix_are_not() -> None:
    assert [supported.refusal((3, minor, 0), "linux") for minor in range(11, 15)] == [""] * 4
    content = (REPO / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.11,<3.15"' in content
    assert [f"Python :: 3.{minor}" in content for minor in range(10, 16)] == [False, True, True, True, True, False]


@pytest.mark.parametrize(
    "name", ["__init__", "__main__", "cli/__init__", "cli/entry", "system/__init__", "system/supported"]
)
def test_version_check_compiles_on_older_pythons(name: str) -> None:
    ast.parse((REPO / "cifar_exp" / f"{name}.py").read_text(), feature_version=(3, 7))


def test_nothing_heavy_is_imported_before() -> None:
    code = (
        "import sys; import cifar_exp.cli.entry; print({*sys.modules} & {'torch', 'hydra', 'rich', 'mlflow', 'numpy'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True
    )
    assert done.stdout == "set()\n"
