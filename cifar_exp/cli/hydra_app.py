"""Hydra at the command line, with this project's messages and exit codes instead of tracebacks."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cifar_exp.config.defaults import conf_dir
from cifar_exp.config.messages import nearest, unknown_setting
from cifar_exp.config.reading import register_resolvers
from cifar_exp.errors import CifarExpError, ConfigError, StorageError
from cifar_exp.records.run_folder import make_private
from cifar_exp.runs.context import RunContext
from cifar_exp.system.process import allow_open_files, outlive_terminal, process_age
from cifar_exp.system.redaction import masked, masked_text
from cifar_exp.system.signals import raise_swallowed

Job = Callable[[DictConfig], Any]
# What it raises for what cannot be composed; only some of it is meant to be read, as for data=[[]].
HYDRAS_ERRORS = (
    *(HydraException, OmegaConfBaseException, OSError),
    *(ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError),
)


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
    begun: list[bool] = []  # what fails before any job has begun is Hydra's: some of it is a bare ValueError

    def guarded(composed: DictConfig) -> Any:
        begun.append(True)
        _keep_private(Path(HydraConfig.get().runtime.output_dir), HydraConfig.get().output_subdir)
        try:
            return job(composed)
        except Exception as error:
            raise_swallowed()  # which may be behind it: numpy cannot be imported again where that was interrupted
            if not isinstance(error, CifarExpError) or HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # the sweeper's to report
            failures.append(error)

    try:
        allow_open_files()
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(guarded)()
    except CifarExpError as error:
        raise_swallowed()
        failures.append(error)
    except HYDRAS_ERRORS as error:
        raise_swallowed()
        if begun:
            raise
        failures.append(explained(error, sys.argv[1:]))
    for failure in failures:
        if str(failure):
            print(f"cifar-exp: {masked_text(str(failure))}", file=sys.stderr)
    return failures[0].exit_code if failures else 0


def options_first(words: Sequence[str]) -> list[str]:
    """``words`` with Hydra's options and their values in front: argparse takes overrides in one piece only."""
    known = get_args_parser()._option_string_actions
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
        ConfigError: where it cannot be composed, as :func:`explained`.
    """
    register_resolvers()
    search = [f"hydra.searchpath=[file://{Path(folder).resolve()}]"] if folder else []
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose("config", [*search, *overrides], return_hydra_config=True)
    except HYDRAS_ERRORS as error:
        raise_swallowed()
        raise explained(error, overrides) from error


def explained(error: Exception, typed: Sequence[str]) -> CifarExpError:
    """A message of ours for what Hydra refuses: setting, rule, nearest valid choice.

    Args:
        error: what Hydra raised.
        typed: the overrides, which are named where the error names none of them.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        options = [str(option) for option in error.options or []]
        return ConfigError(f"{group or choice}={choice}: there is no such choice. {nearest(choice, options)}")
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return ConfigError(unknown_setting(cause.full_key))
    if isinstance(error, OSError):
        return StorageError(f"hydra.run.dir (hydra.sweep.dir with -m): {error}. Type one that you may write to")
    if isinstance(error, OverrideParseException):
        return ConfigError(
            f"{error.override}: it cannot be read as an override. Type key=value; quote lists and spaces"
        )
    if not any(word.lstrip("+~").partition("=")[0] in str(error) for word in typed):
        error = ValueError(f"{' '.join(typed)}: {error}")
    return ConfigError(f"{error}. Type group=choice or key=value, as in model=convnet train.epochs=5; see --help")
