"""Settings: every choice composes and builds; a wrong setting is refused in one message before anything starts."""

import ast
import inspect
import subprocess
import sys
import textwrap
from dataclasses import is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import pytest
from omegaconf import OmegaConf

from cifar_exp.cli.main import COMMANDS
from cifar_exp.config import schema
from cifar_exp.config.defaults import conf_dir, default_settings, settings_of
from cifar_exp.config.reading import read_config
from cifar_exp.config.schema import Config
from cifar_exp.errors import ConfigError
from cifar_exp.runs.components import build
from cifar_exp.runs.target_checks import imported
from tests.conftest import Command, environment
from tests.helpers.configs import composed
from tests.helpers.slurm_step import STEP

GROUPS = ("data", "augment", "model", "optimizer", "schedule", "devices", "launcher", "tracking", "experiment")
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((conf_dir() / group).glob("*.yaml"))]


def test_the_default_is_the_reference_recipe() -> None:
    config = read_config(composed())
    assert (config.train.epochs, config.train.batch_size, config.train.scaling) == (60, 256, "weak")
    assert config.train.normalization == "zerocenter"
    assert config.model == {"_target_": "cifar_exp.models.networks.convnet", "width": 32, "depth": 4}
    assert config.optimizer == {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-10}
    assert config.schedule == {
        "_target_": "cifar_exp.training.schedules.piecewise",
        "drop_factor": 0.1,
        "drop_period": 50,
    }
    assert config.augment == {"_target_": "cifar_exp.data.augment.Shift", "max_pixels": 4.0, "flip_probability": 0.5}


SCHEMAS = [value for value in vars(schema).values() if isinstance(value, type) and value.__module__ == schema.__name__]
CLOSED: dict[str, type] = {name: kind for name, kind in get_type_hints(Config).items() if is_dataclass(kind)}


def names(kind: type) -> set[str]:
    return {name for name, hint in get_type_hints(kind).items() if hint is not ClassVar}


@pytest.mark.parametrize("kind", SCHEMAS, ids=lambda kind: kind.__name__)
def test_schema_describes_each_setting_and_has_no_defaults(kind: type) -> None:
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    lines = {
        ast.unparse(line.target): (line, after) for line, after in pairwise(body) if isinstance(line, ast.AnnAssign)
    }
    for name in names(kind):
        line, after = lines[name]
        assert line.value is None, f"{name} has a default"
        assert isinstance(after, ast.Expr), f"{name} has no sentence"
        assert ast.literal_eval(after.value).endswith("."), name


@pytest.mark.parametrize("choice", [f"{group}={name}" for group, name in CHOICES if group in ("devices", "experiment")])
def test_yaml_sets_each_setting_of_the_schema_and_no_other(choice: str) -> None:
    yaml: Any = OmegaConf.to_container(composed(choice))
    assert set(yaml) == names(Config)
    assert {name: set(yaml[name]) for name in CLOSED} == {name: names(kind) for name, kind in CLOSED.items()}


def test_each_common_setting_of_an_open_section_is_set_in_yaml() -> None:
    settings = default_settings()
    for section, kind in schema.COMMON.items():
        assert [name for name in names(kind) if f"{section}.{name}" not in settings] == []


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_no_signature_repeats_a_default_of_yaml(group: str, choice: str) -> None:
    """But for a tracker's, which are all None: the tracker then asks MLflow's variables."""
    path = OmegaConf.load(conf_dir() / group / f"{choice}.yaml").get("_target_", "")
    if not path.startswith("cifar_exp."):
        return
    parameters = inspect.signature(imported(path, group)).parameters
    repeated = {name: parameters[name].default for name in settings_of(group, choice)}
    expected = None if group == "tracking" else inspect.Parameter.empty
    assert repeated == dict.fromkeys(repeated, expected)


@pytest.mark.parametrize("setting", ["train.epochs", "devices.threads", "data.validation", "optimizer.lr", "seed"])
def test_a_setting_that_yaml_does_not_set_is_named_with_its_default(setting: str) -> None:
    default = default_settings()[setting]
    with pytest.raises(ConfigError, match=rf"^{setting}: it is required\. Set {setting}={default}$"):
        read_config(composed(f"~{setting}"))


def test_reference_preset_is_the_default_recipe_in_its_own_mlflow_experiment() -> None:
    reference, default = read_config(composed("experiment=reference")), read_config(composed())
    assert reference.tracking["experiment"] == "reference"
    assert replace(reference, tracking=default.tracking) == default


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_builds(group: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STEP.items():  # launcher=slurm reads them
        monkeypatch.setenv(name, value)
    parts = build(read_config(composed(f"{group}={choice}")))
    model = parts.make_model(num_classes=7)
    parts.make_optimizer(model.parameters(), lr=0.01)
    assert parts.schedule(0, 10, 2) > 0
    assert parts.launcher.timeout > 0


def test_slurms_launcher_outside_a_step_is_refused_in_one_message() -> None:
    with pytest.raises(ConfigError, match=r"^launcher=slurm: this process is not a task of srun\. Run srun"):
        read_config(composed("launcher=slurm"))


REFUSED = {
    "train.epochs=0": ("train.epochs=0", "1 or more", "Set train.epochs=1"),
    "train.epochs=1.5": ("train.epochs=1.5", "whole number"),
    "train.epochs=sixty": ("train.epochs=sixty", "whole number", "Set train.epochs=60"),
    "train.epochs=true": ("train.epochs=true", "whole number"),
    "train.epochs=null": ("train.epochs=null", "whole number"),
    "optimizer.lr=0": ("optimizer.lr=0", "more than 0"),
    "optimizer.lr=-1": ("optimizer.lr=-1", "more than 0"),
    "optimizer.lr=nan": ("optimizer.lr=nan", "finite"),
    "optimizer.lr=inf": ("optimizer.lr=inf", "finite"),
    "optimizer.momentum=1": ("optimizer.momentum=1", "less than 1"),
    "model.depth=0": ("model.depth=0", "1 or more", "Set model.depth=1"),
    "model.width=wide": ("model.width=wide", "whole number", "Set model.width=32"),
    "devices.count=0": ("devices.count=0", "1 or more or auto"),
    "devices.count=two": ("devices.count=two", "whole number or auto"),
    "train.scaling=stron": ("train.scaling=stron", "weak or strong", "Set train.scaling=strong"),
    "train.lr_scaling=squrt": ("train.lr_scaling=squrt", "linear, sqrt, none", "Set train.lr_scaling=sqrt"),
    "report.target_accuracy=85": ("report.target_accuracy=85", "1.0 or less"),
    "report.price_per_hour=0": ("report.price_per_hour=0", "more than 0"),
    "train.precision=fp8": ("train.precision=fp8", "bf16"),
    "augment.flip_probability=2": ("augment.flip_probability=2", "1.0 or less"),
    "schedule.drop_factor=2": ("schedule.drop_factor=2", "1.0 or less", "Set schedule.drop_factor=1.0"),
    "schedule.drop_factor=0": ("schedule.drop_factor=0", "more than 0", "Set schedule.drop_factor=0.1"),
    "schedule.drop_period=0": ("schedule.drop_period=0", "1 or more"),
    "+model.wdith=64": ("model.wdith=64", "Did you mean model.width?"),
    "+optimizer.nesterv=true": ("optimizer.nesterv=true", "Did you mean optimizer.nesterov?"),
    "+optimizer.params=3": ("optimizer.params=3", "no such setting"),
    "+train.epoch=3": ("train.epoch", "Did you mean train.epochs?"),
    "+train.depth=3": ("train.depth", "Did you mean model.depth?"),
    "+tracking.tags=a": ("tracking.tags=a", "Valid: tracking.experiment"),
    "+sed=1": ("sed", "Did you mean seed?"),
    "model._target_=os.system": ("model._target_=os.system", "trusted_modules=[os]"),
    "model._target_=torch.os.system": ("model._target_=torch.os.system", "in model it must be from"),
    "model._target_=torch.hub.os": ("model._target_=torch.hub.os", "in model it must be from"),
    "model._target_=torch.nn.Linaer": ("model._target_=torch.nn.Linaer", "cannot be imported"),
    "model._target_=torch.nn.Linear": ("model.width=32", "no such setting"),
    "~model": ("model", "is required"),
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_wrong_setting_is_named_with_its_value_and_rule(override: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        build(read_config(composed(override)))
    for part in REFUSED[override]:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model=convnt", ("model=convnt", "Did you mean convnet?")),
        ("experiment=quickstat", ("experiment=quickstat", "Did you mean quickstart?")),
        ("train.epoch=3", ("train.epoch", "Did you mean train.epochs?")),
        ("optimzer=sgd", ("optimzer", "Did you mean optimizer?")),
        ("train.epochs=[", ("train.epochs=[", "override")),
        ("model=null", ("group override",)),
        ("train.epochs=0", ("train.epochs=0", "Set train.epochs=1")),
        ("train.batch_size=${nothing}", ("batch_size", "nothing")),
    ],
)
def test_hydras_own_errors_are_one_message_and_exit_code_2(
    cifar_exp: Command, override: str, parts: tuple[str, ...], workplace: Path
) -> None:
    done = cifar_exp(override)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3
    for part in parts:
        assert part in done.stderr
    assert not list(workplace.rglob("metrics.jsonl"))


def test_more_devices_than_found_is_exit_code_4(cifar_exp: Command) -> None:
    done = cifar_exp("devices=cpu", "devices.count=1000", "tracking=none")
    assert done.returncode == 4
    assert "devices.count=1000" in done.stderr
    assert "requested 1000 cores, found" in done.stderr


def test_an_indivisible_batch_is_refused_before_the_images_are_read(cifar_exp: Command, workplace: Path) -> None:
    for split in ("train", "test"):  # without images
        (workplace / "empty" / split).mkdir(parents=True)
    overrides = "devices=cpu devices.count=2 devices.oversubscribe=true train.scaling=strong train.batch_size=255"
    done = cifar_exp(*overrides.split(), "data=folders", "data.root=empty", "tracking=none")
    assert done.returncode == 2
    assert "Set train.batch_size=256" in done.stderr


def test_a_users_own_config_folder_and_module_add_to_the_groups(cifar_exp: Command, workplace: Path) -> None:
    (workplace / "mine" / "model").mkdir(parents=True)
    (workplace / "mine" / "model" / "tiny.yaml").write_text("_target_: my_models.tiny\nchannels: 3\n")
    (workplace / "my_models.py").write_text(
        "from torch import nn\n"
        "def tiny(*, num_classes: int, channels: int = 1) -> nn.Module:\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 1024, num_classes))\n"
    )
    arguments = ["--config-dir", "mine", "model=tiny", "--cfg", "job"]
    shown = cifar_exp(*arguments)
    assert "_target_: my_models.tiny" in shown.stdout
    refused = cifar_exp("--config-dir", "mine", "model=tiny")
    assert refused.returncode == 2
    assert "trusted_modules=[my_models]" in refused.stderr


LIGHT = [["--help"], ["--version"], ["--cfg", "job"], ["train.epochs=0"], *([name, "--help"] for name in COMMANDS)]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_help_config_and_refusals_do_not_wait_for_torch(arguments: list[str], workplace: Path) -> None:
    code = (
        "import sys\nfrom cifar_exp.cli.main import main\n"
        "try: main()\nfinally: print('heavy:', {'torch', 'mlflow', 'torchvision', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=workplace,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "heavy: set()" in done.stdout


@pytest.mark.parametrize(
    "swap",
    ["tracking=none", "schedule=cosine", "schedule=piecewise", "model=resnet", "model=resnet18", "optimizer=muon"],
)
def test_a_presets_groups_can_be_swapped(swap: str) -> None:
    """What a preset sets belongs to its own choices, so that another choice does not get settings it never had."""
    build(read_config(composed("experiment=quickstart", swap)))


@pytest.mark.parametrize("preset", ["speedrun", "speedrun94"])
@pytest.mark.parametrize(
    "change",
    [
        *("model=resnet", "model=convnet", "model=resnet18", "augment=crop", "augment=shift", "augment=none"),
        *("optimizer=sgd", "optimizer=adamw", "schedule=cosine", "schedule=piecewise", "tracking=none"),
        *("model.whitening=false", "train.image_scales=[]", "train.label_smoothing=0"),
        "train.mirrored_evaluation=true",
    ],
)
def test_each_ingredient_of_the_speed_recipes_can_be_disabled(preset: str, change: str) -> None:
    build(read_config(composed(f"experiment={preset}", change)))


def test_speed_recipes_have_the_measured_settings() -> None:
    small, large = (read_config(composed(f"experiment={name}")) for name in ("speedrun", "speedrun94"))
    assert small.model["widths"] == [64, 128, 256]
    assert large.model == small.model | {"widths": [64, 256, 256]}
    assert (small.train.epochs, large.train.epochs) == (5, 8)
    for section in ("augment", "schedule"):
        assert getattr(small, section) == getattr(large, section)
    rate = large.optimizer["lr"] * large.train.batch_size / 256
    assert rate == pytest.approx(0.24, rel=0.01)
    assert rate * large.optimizer["bias_lr_ratio"] == pytest.approx(0.053, rel=0.01)


@pytest.mark.parametrize("address", ["foo://bar", "README.md", "/tmp/runs", "file:///tmp/runs"])
def test_invalid_tracking_uri_is_refused_before_training(address: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri=.*Set tracking\.uri=sqlite"):
        build(read_config(composed(f"tracking.uri={address}")))
