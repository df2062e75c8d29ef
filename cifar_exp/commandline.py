"""Hydra at the command line, with this project's messages and exit codes instead of tracebacks."""

import os
import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from cifar_exp.config import conf_dir, nearest, register_resolvers, unknown_setting
from cifar_exp.errors import CifarExpError, ConfigError, MachineError, StorageError

Job = Callable[[DictConfig], Any]
OPEN_FILES = 256  # several times what a parent with MLflow has open


def run_hydra(job: Job) -> int:
    """Compose the configuration from ``sys.argv`` and run ``job`` with it, once or for every job of a sweep.

    Returns:
        The exit code. Errors that a user can mend are printed as one message.
    """
    outlive_terminal()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra would print its own errors and exit with 1
    register_resolvers()
    failures: list[CifarExpError] = []
    begun: list[bool] = []  # what fails before any job has begun is Hydra's: some of it is a bare ValueError

    def guarded(composed: DictConfig) -> Any:
        begun.append(True)
        try:
            return job(composed)
        except CifarExpError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # the sweeper's to report
            failures.append(error)

    try:
        allow_open_files()
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(guarded)()
    except CifarExpError as error:
        failures.append(error)
    except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
        if begun:
            raise
        failures.append(explained(error, sys.argv[1:]))
    for failure in failures:
        if str(failure):
            print(f"cifar-exp: {failure}", file=sys.stderr)
    return failures[0].exit_code if failures else 0


def allow_open_files() -> None:
    """See to it that this process and its ranks may open as many files as they need.

    Raises:
        MachineError: where the limit is too low and must not be raised.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:  # -1 is no limit
        if 0 <= hard < OPEN_FILES:
            raise MachineError(
                f"ulimit -n: a process may have {hard} open files here, and a run takes up to {OPEN_FILES}. Type "
                f"ulimit -n {OPEN_FILES} first, where you may, or ask who administrates the machine"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))


def outlive_terminal() -> None:
    """From now on what cannot be printed is dropped: a run must not end because nobody reads it any more.

    That is the case behind ``| head``, on a terminal that was closed and on a full disk.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.write = _or_nowhere(stream, stream.write)  # type: ignore[method-assign]
        stream.flush = _or_nowhere(stream, stream.flush)  # type: ignore[method-assign]


def _or_nowhere(stream: TextIO, act: Callable[..., Any]) -> Callable[..., Any]:
    """``act`` of the stream, which goes nowhere from the first failure on."""

    def acting(*arguments: Any) -> Any:
        try:
            return act(*arguments)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            return act(*arguments)

    return acting


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
