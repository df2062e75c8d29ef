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
from cifar_exp.config.reading import TRUSTED, register_resolvers
from cifar_exp.config.refusals import explained
from cifar_exp.errors import CifarExpError
from cifar_exp.records.run_folder import make_private
from cifar_exp.system.bugs import told
from cifar_exp.system.process import allow_open_files, outlive_terminal
from cifar_exp.system.redaction import masked, masked_text
from cifar_exp.system.signals import raise_swallowed

Job = Callable[[DictConfig], Any]


def run_hydra(job: Job) -> int:
    """Compose the configuration from ``sys.argv`` and run ``job`` with it, once or for every job of a sweep.

    Returns:
        The exit code. Errors that a user can mend are printed as one message.
    """
    outlive_terminal()
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
        hydra_versions.run_command(guarded, conf_dir(), TRUSTED)
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
