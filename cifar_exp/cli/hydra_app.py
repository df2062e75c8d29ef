"""Hydra at the command line, with this project's messages and exit codes instead of tracebacks."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cifar_exp.config import hydra_versions
from cifar_exp.config.defaults import conf_dir
from cifar_exp.config.reading import register_resolvers
from cifar_exp.config.refusals import explained
from cifar_exp.config.targets import ALLOWED
from cifar_exp.errors import CifarExpError
from cifar_exp.records.run_folder import make_private
from cifar_exp.runs.context import RunContext
from cifar_exp.system.bugs import told
from cifar_exp.system.host import process_age
from cifar_exp.system.process import allow_open_files, outlive_terminal
from cifar_exp.system.redaction import masked, masked_text
from cifar_exp.system.signals import raise_swallowed

Job = Callable[[DictConfig], Any]
# What configurations may name, and what conf/config.yaml names for Python's logging.
CALLED = ("cifar_exp.system.redaction.MaskingFormatter", *(path for paths in ALLOWED.values() for path in paths))


def run_hydra(job: Job, words: Sequence[str]) -> int:
    """Compose the configuration from ``words`` and run ``job`` with it, once or for every job of a sweep.

    Returns:
        The exit code. Errors that a user can mend are printed as one message.
    """
    outlive_terminal()
    sys.argv[1:] = options_first(words)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra would print its own errors and exit with 1
    register_resolvers()
    failures: list[CifarExpError] = []
    begun: list[bool] = []  # what fails before any job has begun may come from what was typed

    def guarded(composed: DictConfig) -> Any:
        begun.append(True)
        _keep_private(Path(HydraConfig.get().runtime.output_dir), HydraConfig.get().output_subdir)
        try:
            return job(composed)
        except Exception as error:
            raise_swallowed()  # which may be behind it: numpy cannot be imported again where that was interrupted
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # the sweeper's to report
            failures.append(told(error))  # Hydra would name all overrides as what it was executing

    try:
        allow_open_files()
        hydra_versions.run_command(guarded, conf_dir(), CALLED)
    except CifarExpError as error:
        raise_swallowed()
        failures.append(error)
    except Exception as error:
        raise_swallowed()
        failures.append((None if begun else explained(error, sys.argv[1:])) or told(error))
    for failure in failures:
        if str(failure):
            print(f"cifar-exp: {masked_text(str(failure))}", file=sys.stderr)
    return failures[0].exit_code if failures else 0


def options_first(words: Sequence[str]) -> list[str]:
    """``words`` with Hydra's options and their values in front: argparse takes overrides in one piece only."""
    known = hydra_versions.options()
    options, overrides, rest = list[str](), list[str](), list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            overrides.append(word)
            continue
        options.append(word)
        action = known.get(word)
        if action is None or not rest:
            continue
        if action.nargs is None or (action.nargs == "?" and rest[0] in (action.choices or ())):
            options.append(rest.pop(0))
    return [*options, *overrides]


def run_context() -> RunContext:
    """Where Hydra runs the current job: its folder, its overrides, its sweep."""
    hydra_config = HydraConfig.get()
    single = hydra_config.mode == RunMode.RUN
    return RunContext(
        folder=Path(hydra_config.runtime.output_dir),
        overrides=tuple(hydra_config.overrides.task),
        sweep_dir=None if single else Path(hydra_config.sweep.dir),
        age=process_age() if single else 0.0,
    )


def _keep_private(folder: Path, subfolder: str | None) -> None:
    """Close the job's folder to others, and take the secrets out of what Hydra has put there, where it was asked to."""
    make_private(folder)
    for path in (folder / subfolder).glob("*.yaml") if subfolder else ():
        content = OmegaConf.to_container(OmegaConf.load(path))
        OmegaConf.save(OmegaConf.create(masked(content)), path)


def composed(overrides: Sequence[str], folder: str | None = None) -> DictConfig:
    """The configuration, Hydra's own part included, for a command that Hydra does not run.

    Args:
        overrides: as typed, each ``group=choice`` or ``key=value``.
        folder: of more configuration, as ``--config-dir``.

    Raises:
        ConfigError: where it cannot be composed, as :func:`cifar_exp.config.refusals.explained`.
    """
    register_resolvers()
    search = [f"hydra.searchpath=[file://{Path(folder).resolve()}]"] if folder else []
    try:
        with hydra_versions.composing(conf_dir()):
            return compose("config", [*search, *overrides], return_hydra_config=True)
    except Exception as error:
        raise_swallowed()
        if (problem := explained(error, overrides)) is None:
            raise
        raise problem from error
