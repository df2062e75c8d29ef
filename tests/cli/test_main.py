"""One grammar: the subcommand may be anywhere, and its arguments are the same everywhere."""

import importlib
from importlib.metadata import version
from pathlib import Path

import click
import pytest

from cifar_exp.cli.main import COMMANDS, OWN_VALUE_OPTIONS, run_command, with_subcommand_first
from cifar_exp.config import hydra_versions
from tests.conftest import TINY, Command


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("", "train"),
        ("seed=1", "train seed=1"),
        ("-m seed=1,2", "train -m seed=1,2"),
        ("+new=1 ~model.width", "train +new=1 ~model.width"),
        ("--config-dir verify seed=1", "train --config-dir verify seed=1"),
        ("--cfg job verify", "verify --cfg job"),
        ("--config-dir mine verify devices.count=1,2", "verify --config-dir mine devices.count=1,2"),
        ("--config-dir=mine devices.count=1,2 verify", "verify --config-dir=mine devices.count=1,2"),
        ("verify --config-dir mine devices.count=1,2", "verify --config-dir mine devices.count=1,2"),
        ("--info verify", "verify --info"),
        ("--info config verify", "verify --info config"),
        ("checkpoint=last --json predict latest data", "predict --json checkpoint=last latest data"),
        ("--to data report latest", "report --to data latest"),
        ("--port 5001 ui", "ui --port 5001"),
        ("predict latest data", "predict latest data"),
        ("--help", "--help"),
        ("--help predict", "predict --help"),
        ("seed=1 --help", "train seed=1 --help"),
        ("seed=1 nonsense verify", "train seed=1 nonsense verify"),
        ("nonsense verify", "nonsense verify"),
    ],
)
def test_subcommand_may_be_anywhere_in_the_command_line(typed: str, expected: str) -> None:
    assert with_subcommand_first(typed.split()) == expected.split()


def test_options_with_a_value_are_known_before_subcommands_are_imported() -> None:
    loaded = [importlib.import_module(f"cifar_exp.cli.{name}").command for name in COMMANDS]
    options = [option for command in loaded for option in command.params if isinstance(option, click.Option)]
    assert {spelling for option in options if not option.is_flag for spelling in option.opts} == set(OWN_VALUE_OPTIONS)
    assert not set(OWN_VALUE_OPTIONS) & hydra_versions.options().keys()


@pytest.mark.parametrize(
    "typed",
    ["--version", "train --version", "devices=cpu --version", "-m seed=1,2 --version", "verify --version", "--vers"]
    + [f"{name} --version" for name in COMMANDS],
)
def test_the_version_is_the_packages_everywhere(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(typed.split()) == 0
    assert capsys.readouterr().out == f"cifar-exp, version {version('cifar-exp')}\n"


def test_config_dir_may_precede_the_verify_subcommand(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--config-dir", str(workplace), "verify", "devices.count=1"]) == 2
    assert "one rank is the reference for the comparison. Set devices.count=1,2" in capsys.readouterr().err


def test_sync_accepts_the_settings_in_its_help(
    cifar_exp: Command, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cifar_exp(*TINY, "hydra.run.dir=outputs/run").returncode == 0
    run_id = (workplace / "outputs" / "run" / "mlflow_run_id").read_text().split()[0]
    for word in ("latest", run_id, "outputs/run", "outputs"):
        assert run_command(["sync", word]) == 0
        assert "outputs/run" in capsys.readouterr().out
    assert run_command(["sync", "--help"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "sync [OPTIONS] RUN|SWEEP..." in output
    assert "RUN and SWEEP are a folder, an MLflow run id, or `latest`" in output
