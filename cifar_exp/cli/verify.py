"""`cifar-exp verify`: check on this machine whether N ranks compute what one rank computes."""

import logging
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cifar_exp.cli.words import refuse_unusable_names
from cifar_exp.errors import ConfigError, MachineError, storage_errors
from cifar_exp.system.process import allow_open_files
from cifar_exp.system.scheduler import refuse_many_processes
from cifar_exp.system.standard_streams import ignore_broken_output

if TYPE_CHECKING:  # heavy imports are inside functions, so that --help and a wrong setting answer at once
    from cifar_exp.config.schema import Config

# Full precision and a fixed order of sums, so that rounding does not hide a real difference.
STRICT = ("train.precision=fp32", "train.deterministic=true")
COUNT = "devices.count"
CHECKED = "one rank is the reference for the comparison"


@click.command("verify", context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[SETTINGS]...")
def command(words: tuple[str, ...]) -> int:
    """Check on this machine whether N ranks compute what one rank computes.

    The command starts N ranks as for training, and one rank that accumulates the gradients of the same micro-batches.
    It compares the images of one epoch, bit for bit and in order; the gradients, losses and parameters of the first
    three steps; and the evaluation of the test set, where each image must count once. Nothing is tracked.
    parity.md and parity.json are written to a new folder under outputs/.

    \b
    devices.count=1,2,4         numbers of ranks (default: 1, 2, 4, ... up to the devices of this machine)
    devices.oversubscribe=true  allow more CPU ranks than cores
    progress=quiet              print only the verdict
    hydra.run.dir=<folder>      output folder
    --config-dir <folder>       your own configuration, as for cifar-exp
    <group>=<choice>, <key>=<value>  any setting of cifar-exp; the defaults are train.precision=fp32 and
                                train.deterministic=true

    Exit codes: 0 the ranks compute the same, 1 they do not; others as for cifar-exp.
    """
    refuse_many_processes()
    return 0 if verify(words) else 1


def verify(words: Sequence[str]) -> bool:
    """Run the check with the settings ``words``.

    Returns:
        Whether N ranks compute what one rank computes.

    Raises:
        CifarExpError: the check could not be run.
    """
    from cifar_exp.runs.train_composed import build_components
    from cifar_exp.system.redaction import masked

    ignore_broken_output()
    allow_open_files()
    refuse_unusable_names(words)
    configs, folder = configurations(words)
    components = [build_components(config) for config in configs]

    from cifar_exp.parity.run import check_parity, prepared
    from cifar_exp.system.terminal import Terminal

    cases = prepared(configs, components)
    _open(folder)
    console = Terminal(quiet=configs[0].progress == "quiet", soft_wrap=True)
    report = check_parity(cases, shlex.join(["cifar-exp", "verify", *masked(list(words))]), console)
    report.print(console)
    print(f"{report.verdict}: {report.write(folder)}")
    return report.holds


def configurations(words: Sequence[str]) -> "tuple[list[Config], Path]":
    """Compose a configuration for each number of ranks.

    Args:
        words: overrides and ``--config-dir``.

    Returns:
        The configurations and the output folder.

    Raises:
        ConfigError: a setting is wrong.
        MachineError: ``devices.count`` is not set and the machine has one device.
    """
    config_dir, overrides = _options(words)
    typed = [word.partition("=")[2] for word in overrides if _key(word) == COUNT]
    others = [word for word in overrides if _key(word) != COUNT]
    counts = typed[-1].split(",") if typed else ["auto"]
    if "auto" in counts and len(counts) > 1:
        raise ConfigError(f"{COUNT}={typed[-1]}: it must be numbers, or auto alone. Set {COUNT}=1,2")
    if counts == ["auto"]:
        config, _ = _composed([*others, f"{COUNT}=auto"], config_dir)
        counts = [*map(str, _powers_of_two(config))]
    elif counts == ["1"]:
        raise ConfigError(f"{COUNT}=1: {CHECKED}. Set {COUNT}=1,2")
    composed = [_composed([*others, f"{COUNT}={count}"], config_dir) for count in dict.fromkeys(counts)]
    return [config for config, _ in composed], composed[0][1]


def _options(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split ``words`` into the value of ``--config-dir`` and the overrides."""
    config_dir, overrides, rest = None, list[str](), iter(words)
    for word in rest:
        option, _, value = word.partition("=")
        if option in ("--config-dir", "-cd"):
            config_dir = value or next(rest, "")
            if not Path(config_dir).is_dir():
                raise ConfigError(f"{option} {config_dir}: there is no such folder. Set {option}=<an existing folder>")
        elif word.startswith("-"):
            raise ConfigError(f"{word}: there is no such option. See cifar-exp verify --help")
        else:
            overrides.append(word)
    return config_dir, overrides


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _composed(overrides: Sequence[str], config_dir: str | None) -> "tuple[Config, Path]":
    """The configuration without tracking and with the loss of every step, and Hydra's run folder for it."""
    from omegaconf import open_dict, read_write

    from cifar_exp.cli.hydra_app import composed
    from cifar_exp.config.reading import read_config

    whole = composed([*STRICT, *overrides], config_dir)
    folder = Path(whole.hydra.run.dir)
    with read_write(whole), open_dict(whole):
        del whole["hydra"]
    config = read_config(whole)
    train = replace(config.train, log_every=1, profile=False, max_seconds=None)
    return replace(config, train=train, tracking={"_target_": "cifar_exp.tracking.tracker.NoTracker"}), folder


def _powers_of_two(config: "Config") -> list[int]:
    from cifar_exp.launch.devices import device_counts, find_devices

    counts = device_counts(config.devices)
    if counts == [1]:
        found = find_devices(replace(config.devices, count=1))
        cpu = "" if found.accelerator == "cpu" else "devices=cpu "
        unit = "core" if found.accelerator == "cpu" else "GPU"
        raise MachineError(
            f"{COUNT}=auto: found {found.found} {unit}{'s'[: found.found > 1]} for ranks of {found.threads} thread(s), "
            f"and {CHECKED}. Set {cpu}{COUNT}=1,2 devices.oversubscribe=true"
        )
    return counts


def _open(folder: Path) -> None:
    """Create the report's folder and its log. The folder must be empty."""
    from cifar_exp.records.run_folder import make_folder
    from cifar_exp.system.redaction import MaskingFormatter

    with storage_errors(folder, "Set hydra.run.dir=<a folder that you may write to>"):
        make_folder(folder)
        if any(folder.iterdir()):
            raise ConfigError(f"hydra.run.dir={folder}: the folder is not empty. Set hydra.run.dir=<a new folder>")
        handler = logging.FileHandler(folder / "cifar-exp-verify.log")
    handler.setFormatter(MaskingFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
