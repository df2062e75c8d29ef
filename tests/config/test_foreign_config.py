"""An untrusted preset cannot make Hydra call anything outside the allow-list, and its YAML has limits."""

from pathlib import Path
from typing import Any

import pytest
from hydra._internal import hydra as hydras
from omegaconf import OmegaConf

from cifar_exp.cli.hydra_app import ALLOWED_TARGETS, composed, run_hydra
from cifar_exp.config import hydra_versions
from cifar_exp.config.hydra_section import check_hydra_section, typed_targets
from cifar_exp.errors import CifarExpError, ConfigError

HARMFUL: list[tuple[str, Any]] = [
    ("hydra.callbacks.x", {"_target_": "torch.utils.collect_env.run", "command": "id"}),
    ("hydra.callbacks.x.y", {"_target_": "os.mkdir"}),
    ("hydra.job_logging.formatters.x", {"()": "os.mkdir", "path": "x"}),
    ("hydra.job_logging.handlers.x", {"class": "subprocess.Popen"}),
    ("hydra.hydra_logging.handlers.x", {"class": "logging.handlers.HTTPHandler"}),
    ("hydra.job_logging.filters.x", {"()": "ext://os.system"}),
    ("hydra.job_logging.handlers.x", {"stream": "ext://os.environ"}),
    ("hydra.hydra_logging.formatters.x", {"class": "${oc.env:HOME}"}),
]


@pytest.mark.parametrize(("setting", "content"), HARMFUL)
def test_targets_that_hydra_would_call_are_checked(setting: str, content: dict[str, Any]) -> None:
    config = OmegaConf.create({"hydra": {}})
    OmegaConf.update(config, setting, content)
    name, value = next(iter(content.items()))
    with pytest.raises(ConfigError) as refusal:
        check_hydra_section(config, ALLOWED_TARGETS)
    assert str(refusal.value).startswith(f"{setting}.{name}={value}: ")
    typed = [f"+{setting}.{name}={value}"]
    OmegaConf.update(config, "hydra.overrides", {"hydra": typed})
    if name in ("_target_", "class") and "$" not in value:
        check_hydra_section(config, ALLOWED_TARGETS)


@pytest.mark.parametrize(
    ("word", "targets"),
    [
        ("+hydra.callbacks.x._target_=mine.Callback", ["mine.Callback"]),
        ("+hydra.callbacks.x={_target_: mine.Callback, names: [a.b]}", ["mine.Callback", "a.b"]),
        ("trusted_modules=[mine,ours]", ["mine.*", "ours.*"]),
        ("hydra.run.dir=/tmp/x", []),
        ("+hydra.callbacks.x._target_=*", []),
        ("+hydra.callbacks.x={", []),
        ("model.width=4", []),
    ],
)
def test_targets_on_the_command_line_are_allowed(word: str, targets: list[str]) -> None:
    assert typed_targets([word]) == targets


@pytest.mark.parametrize("choice", ["default", "none", "stdout", "disabled", "run_log"])
def test_hydras_own_choices_pass(choice: str) -> None:
    words = [f"hydra/job_logging={choice}"]
    check_hydra_section(composed(words), ALLOWED_TARGETS)


def test_preset_with_forbidden_target_is_refused_before_any_call(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "mine" / "experiment").mkdir(parents=True)
    callback = "hydra: {callbacks: {x: {_target_: os.mkdir, path: executed}}}"
    log = "hydra: {job_logging: {formatters: {x: {(): os.mkdir, path: executed}}}}"
    trust = "trusted_modules: [posix]\nmodel: {_target_: posix.mkdir, path: executed}"
    rows = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20)]
    bomb = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]", *rows])
    for content, message in {
        callback: "hydra.callbacks.x._target_=os.mkdir: ",
        log: "hydra.job_logging.formatters.x.()=os.mkdir: ",
        trust: "trusted_modules=[posix]: a file of the configuration sets it, and it counts only where it is typed",
        bomb: "values after expanding aliases",
    }.items():
        (workplace / "mine" / "experiment" / "evil.yaml").write_text(f"# @package _global_\n{content}\n")
        words = ["--config-dir", "mine", "experiment=evil", "hydra.run.dir=run"]
        assert run_hydra(lambda *_: pytest.fail("it is trained"), words) == 2
        assert message in capsys.readouterr().err
    assert {path.name for path in workplace.iterdir()} == {"mine"}


def test_other_commands_refuse_forbidden_targets_too(workplace: Path) -> None:
    (workplace / "experiment").mkdir()
    evil = workplace / "experiment" / "evil.yaml"
    evil.write_text("# @package _global_\ntrusted_modules: [posix]\n")
    with pytest.raises(ConfigError, match="counts only where it is typed"):
        composed(["experiment=evil"], str(workplace))
    assert composed(["experiment=evil", "trusted_modules=[mine]"], str(workplace)).trusted_modules == ["mine"]
    evil.write_text("# @package _global_\na: " + "[" * 100 + "]" * 100 + "\n")
    with pytest.raises((CifarExpError, Exception), match="nested more than 40 levels"):
        composed(["experiment=evil"], str(workplace))


def test_hydra_functions_are_restored() -> None:
    before = hydras.Callbacks, hydras.configure_log, OmegaConf.load  # type: ignore[attr-defined]
    with hydra_versions._checking(ALLOWED_TARGETS):
        assert hydras.Callbacks is not before[0]  # type: ignore[attr-defined]
    assert (hydras.Callbacks, hydras.configure_log, OmegaConf.load) == before  # type: ignore[attr-defined]
