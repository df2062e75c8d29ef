"""The README's commands run as written, with overrides that limit their size."""

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import REPO, TINY, Command
from tests.helpers.cifar10_release import (
    SMALL_RELEASE,
    Server,
    server,  # noqa: F401
)
from tests.helpers.mlflow_runs import all_runs, client
from tests.helpers.readme import README, folders

SETTINGS = (REPO / "docs" / "settings.md").read_text()
SMALL = [
    *("train.batch_size=16", "train.epochs=1", "model.width=4", "model.depth=1", "devices=cpu", "train.precision=fp32"),
]


def commands() -> list[list[str]]:
    """The arguments of every ``cifar-exp`` line of the README, comments taken off."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    typed = [shlex.split(line.partition(" #")[0]) for line in lines]
    return [words[words.index("cifar-exp") + 1 :] for words in typed if "cifar-exp" in words]


@pytest.mark.usefixtures("no_store")
def test_the_quickstart_reaches_over_nine_tenths(cifar_exp: Command, workplace: Path) -> None:
    (arguments,) = [words for words in commands() if "experiment=quickstart" in words]
    done = cifar_exp(*arguments, timeout=280)  # seconds by themselves; other work may share the cores
    assert done.returncode == 0, done.stderr
    (run,) = all_runs(client())
    assert run.data.metrics["test/accuracy"] > 0.9
    assert "try next" in done.stdout
    assert (workplace / "outputs").is_dir()


def test_training_on_folders_then_prediction(cifar_exp: Command, workplace: Path) -> None:
    folders(workplace / "my-images")
    (arguments,) = [words for words in commands() if "data=folders" in words]
    assert arguments == shlex.split(
        "data=folders data.root=my-images model.width=64 model.depth=6 optimizer=adamw devices.count=2"
    )
    small = [*SMALL, "train.batch_size=8", "devices.oversubscribe=true", "tracking=none"]
    done = cifar_exp(*[word for word in arguments if "model." not in word], *small)
    assert done.returncode == 0, done.stderr
    (words,) = [words for words in commands() if "predict" in words]
    (workplace / "my-images" / "test" / "ant").rename(workplace / "my-pictures")
    labels = cifar_exp(*words)
    assert labels.returncode == 0, labels.stderr
    lines = labels.stdout.splitlines()
    assert len(lines) == 5
    assert all(re.fullmatch(r"my-pictures/\d\.png  (ant|bee|cow)  \d+\.\d%", line) for line in lines)


def test_the_sweep_composes_and_runs(cifar_exp: Command, workplace: Path) -> None:
    (arguments,) = [words for words in commands() if "-m" in words]
    limits = [word for word in TINY if not word.startswith(("devices.count", "model.", "train.log_every"))]
    limits.append("seed=0")
    done = cifar_exp(*arguments, *limits, "train.epochs=1", "train.batch_size=16", "devices.oversubscribe=true")
    assert done.returncode == 0, done.stderr
    assert list((workplace / "outputs" / "multirun").rglob("metrics.jsonl"))


def test_every_override_of_the_readmes_table_is_accepted() -> None:
    from cifar_exp.config.reading import read_config
    from cifar_exp.runs.components import build
    from tests.helpers.configs import composed

    table = (README + SETTINGS).partition("| I want | I type |")[2]
    typed = [
        code
        for line in table.splitlines()
        if line.startswith("|")
        for code in re.findall(r"`([^`]+)`", line)
        if "=" in code and "<" not in code
    ]
    assert len(typed) >= 40
    for code in typed:
        build(read_config(composed(*shlex.split(code))))


def test_the_reference_recipe_fetches_verifies_and_trains(cifar_exp: Command, server: Server) -> None:  # noqa: F811
    """The bare command, with a small archive of the release's format on a loopback server in place of the release."""
    arguments = [words for words in commands() if not words]
    assert arguments == [[]]
    release = [*SMALL_RELEASE, f"data.mirror={server.address}"]
    done = cifar_exp(*release, *SMALL, "tracking=none")
    assert done.returncode == 0, done.stderr
    assert "100 in 10 classes" in done.stdout
    wrong = cifar_exp(*release, f"data.sha256={'0' * 64}", *SMALL, "data.root=elsewhere", "tracking=none")
    assert wrong.returncode == 3
    assert "sha256" in wrong.stderr
    assert "Traceback" not in wrong.stderr
