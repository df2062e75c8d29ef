"""Run Hydra from the command line, with this project's messages and exit codes instead of tracebacks."""

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
from cifar_exp.system.bugs import as_user_error
from cifar_exp.system.host import process_age
from cifar_exp.system.printable import tell
from cifar_exp.system.process import allow_open_files, ignore_broken_output
from cifar_exp.system.redaction import masked, masked_text
from cifar_exp.system.signals import raise_swallowed

Job = Callable[[DictConfig, RunContext], Any]
# Every allowed `_target_`, and the class that conf/config.yaml names for Python's logging.
ALLOWED_TARGETS = (
    "cifar_exp.system.redaction.MaskingFormatter",
    *(path for paths in ALLOWED.values() for path in paths),
)


def run_hydra(job: Job, words: Sequence[str]) -> int:
    """Compose the configuration and run ``job`` with it, once or for every job of a sweep.

    Args:
        job: called with the composed configuration, and the folder, overrides and sweep of the run.
        words: the words of the command line: overrides and Hydra's options.

    Returns:
        The exit code. An error that the user can fix is printed as one message.
    """
    ignore_broken_output()
    sys.argv[1:] = options_first(words)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra would print its own errors and exit with 1
    register_resolvers()
    failures: list[CifarExpError] = []
    begun: list[bool] = []  # an error before the first job may come from the command line

    def run_and_collect_failure(composed: DictConfig) -> Any:
        """Run the job. A single run's error is kept for the message at the end; a sweep's job raises."""
        begun.append(True)
        _keep_private(Path(HydraConfig.get().runtime.output_dir), HydraConfig.get().output_subdir)
        try:
            return job(composed, _run_context())
        except Exception as error:
            # The error may come from a signal. An import of numpy that a signal interrupts cannot be repeated.
            raise_swallowed()
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # the sweeper reports it
            failures.append(as_user_error(error))  # not raised: Hydra would print all overrides with it

    try:
        allow_open_files()
        hydra_versions.run_command(run_and_collect_failure, conf_dir(), ALLOWED_TARGETS)
    except CifarExpError as error:
        raise_swallowed()
        failures.append(error)
    except Exception as error:
        raise_swallowed()
        failures.append((None if begun else explained(error, sys.argv[1:])) or as_user_error(error))
    for failure in failures:
        if str(failure):
            tell(masked_text(str(failure)))
    return failures[0].exit_code if failures else 0


def options_first(words: Sequence[str]) -> list[str]:
    """``words`` with Hydra's options and their values first: argparse takes the overrides only as one group."""
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


def _run_context() -> RunContext:
    """The folder, overrides and sweep of Hydra's current job."""
    hydra_config = HydraConfig.get()
    single = hydra_config.mode == RunMode.RUN
    # As typed: an override may refer to a setting that does not exist, which `read_config` reports.
    overrides: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    return RunContext(
        folder=Path(hydra_config.runtime.output_dir),
        overrides=tuple(overrides),
        sweep_dir=None if single else Path(hydra_config.sweep.dir),
        age=process_age() if single else 0.0,
    )


def _keep_private(folder: Path, subfolder: str | None) -> None:
    """Make the job's folder private and mask secrets in Hydra's YAML files in ``subfolder``, if there is one."""
    make_private(folder)
    for path in (folder / subfolder).glob("*.yaml") if subfolder else ():
        content = OmegaConf.to_container(OmegaConf.load(path))
        OmegaConf.save(OmegaConf.create(masked(content)), path)


def composed(overrides: Sequence[str], folder: str | None = None) -> DictConfig:
    """Compose the configuration for a command that Hydra does not run.

    Args:
        overrides: each ``group=choice`` or ``key=value``.
        folder: a folder with more configuration, as for ``--config-dir``.

    Returns:
        The configuration, including the section ``hydra``.

    Raises:
        ConfigError: it cannot be composed; the message is that of :func:`cifar_exp.config.refusals.explained`.
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
