"""Run Hydra from the command line, with this project's messages and exit codes instead of tracebacks."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cifar_exp.cli.options import refuse_unknown_options, split_options
from cifar_exp.cli.words import refuse_unusable_names
from cifar_exp.config import hydra_versions
from cifar_exp.config.defaults import conf_dir
from cifar_exp.config.hydra_errors import explained
from cifar_exp.config.hydra_section import check_typed_trust
from cifar_exp.config.reading import register_resolvers
from cifar_exp.config.targets import ALLOWED
from cifar_exp.errors import CifarExpError, Stopped, storage_errors
from cifar_exp.records.folder_check import check_folder
from cifar_exp.records.refused_start import REFUSING_ERRORS, Before
from cifar_exp.records.run_folder import RUN_FILE, make_folder, make_job_private
from cifar_exp.runs.context import RunContext
from cifar_exp.system.bugs import as_user_error
from cifar_exp.system.host import process_age
from cifar_exp.system.printable import print_notice
from cifar_exp.system.process import allow_open_files
from cifar_exp.system.redaction import masked, masked_text
from cifar_exp.system.signals import raise_swallowed, swallowed
from cifar_exp.system.standard_streams import ignore_broken_output

Job = Callable[[DictConfig, RunContext], Any]
# Every allowed `_target_`, the class that conf/config.yaml names for Python's logging, and Hydra's own callbacks.
ALLOWED_TARGETS = (
    *("cifar_exp.system.redaction.MaskingFormatter", "hydra.experimental.callbacks.*"),
    *(path for paths in ALLOWED.values() for path in paths),
)


class StoppedJobError(Exception):
    """A signal ended the job; ``Stopped`` is the cause. Hydra 1.3 tells its callbacks only about an Exception."""


class Jobs:
    """The task function for Hydra: it runs a single run, or each job of a sweep, perhaps in another process.

    Attributes:
        begun: whether a job was called here. An error before the first one may come from the command line.
        exit_code: exit code of the first failed job of a sweep; 0 if none failed.
    """

    def __init__(self, job: Job, check: Callable[[DictConfig], None] | None, is_rerun: bool) -> None:
        """``check``: called with a configuration; raises the errors that can be found without training."""
        self._job, self._check, self._is_rerun = job, check, is_rerun
        self._before: Before | None = None  # Hydra creates the folder of a single run
        self.begun, self.exit_code = False, 0

    def __call__(self, composed: DictConfig) -> Any:
        self.begun = True
        hydra = HydraConfig.get()
        is_single = hydra.mode == RunMode.RUN or self._is_rerun
        if self._is_rerun:
            self._set_new_folder(hydra)
        folder = Path(hydra.runtime.output_dir)
        if not is_single:
            make_job_private(folder)
        _mask_secrets(folder, hydra.output_subdir)
        try:
            typed = OmegaConf.to_container(hydra.overrides.task)  # not resolved: values may be interpolations
            assert isinstance(typed, list)
            check_typed_trust(composed, [str(word) for word in typed])
            with chdir(hydra.runtime.cwd):  # hydra.job.chdir: settings name files from where the command was started
                return self._job(composed, _run_context())
        except Stopped as stopped:
            raise StoppedJobError from stopped
        except Exception as error:
            if signalled := swallowed():  # the cause: numpy cannot be imported again after an interrupted import
                raise StoppedJobError from signalled
            if isinstance(error, REFUSING_ERRORS):
                self._remove_new_folder(folder, is_single, hydra.output_subdir)
            raise

    def _remove_new_folder(self, folder: Path, is_single: bool, subfolder: str | None) -> None:
        """Remove the folder of a refused job, unless the job had been started before."""
        if is_single and self._before:
            self._before.restore(subfolder=subfolder)
        elif not is_single and not (folder / RUN_FILE).exists():
            Before(folder, [folder], frozenset()).restore(subfolder=subfolder)

    def check(self, composed: DictConfig) -> None:
        """Raise a ``CifarExpError`` for an error in a job's configuration that can be found without training."""
        if self._check:
            self._check(composed)

    def before_folder(self, folder: Path) -> None:
        """Note the state of the disk before Hydra creates ``folder``, and create it only for this user.

        An existing folder must contain no links.
        """
        check_folder(folder)
        self._before = Before.of(folder)
        with suppress(OSError):  # Hydra tries again, and what it raises is explained
            make_folder(folder)

    def sweep_failed(self, exit_code: int) -> None:
        """Note that some jobs of a sweep failed. Each was reported."""
        self.exit_code = exit_code

    def _set_new_folder(self, hydra: Any) -> None:
        """Give a run that is started again from its pickled configuration a new folder."""
        setup_globals()  # the name of the folder has the time in it, and the pickled one is remembered
        OmegaConf.clear_cache(hydra._get_root())
        folder = Path(hydra.run.dir).absolute()
        self.before_folder(folder)
        with storage_errors(folder, "Set hydra.run.dir to a folder that you may write to"):
            folder.mkdir(parents=True, exist_ok=True)
        with read_write(hydra), open_dict(hydra):
            hydra.runtime.output_dir, hydra.runtime.cwd, hydra.mode = str(folder), str(Path.cwd()), RunMode.RUN


def run_hydra(job: Job, words: Sequence[str], check: Callable[[DictConfig], None] | None = None) -> int:
    """Compose the configuration and run ``job`` with it, once or for every job of a sweep.

    Args:
        job: called with the composed configuration, and the folder, overrides and sweep of the run.
        words: the words of the command line: overrides and Hydra's options.
        check: called with a configuration; raises the errors that can be found without training.

    Returns:
        The exit code. An error that the user can fix is printed as one message.
    """
    ignore_broken_output()
    sys.argv[1:] = options_first(words)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra would print its own errors and exit with 1
    register_resolvers()
    jobs = Jobs(job, check, is_rerun=any(word.startswith("--experimental-rerun") for word in words))
    try:
        refuse_unusable_names(words)
        allow_open_files()
        refuse_unknown_options(words, hydra_versions.options())
        hydra_versions.run_hydra_main(jobs, conf_dir(), ALLOWED_TARGETS, jobs.before_folder)
    except CifarExpError as error:
        raise_swallowed()
        return _print_failure(error)
    except Exception as error:
        if stopped := Stopped.cause_of(error):
            raise stopped from None
        raise_swallowed()
        return _print_failure((None if jobs.begun else explained(error, sys.argv[1:])) or as_user_error(error))
    return jobs.exit_code


def _print_failure(failure: CifarExpError) -> int:
    print_notice(masked_text(str(failure)))
    return failure.exit_code


def options_first(words: Sequence[str]) -> list[str]:
    """``words`` with Hydra's options and their values first: argparse takes the overrides only as one group."""
    options, overrides = split_options(words, hydra_versions.options())
    return [*options, *overrides]


def _run_context() -> RunContext:
    """The folder, overrides and sweep of Hydra's current job."""
    hydra_config = HydraConfig.get()
    single = hydra_config.mode == RunMode.RUN
    # As typed: an override may refer to a setting that does not exist, which `read_config` reports.
    overrides: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    return RunContext(
        folder=Path(hydra_config.runtime.output_dir),
        overrides=tuple(map(str, overrides)),
        sweep_dir=None if single else Path(hydra_config.sweep.dir),
        age=process_age() if single else 0.0,
    )


def _mask_secrets(folder: Path, subfolder: str | None) -> None:
    """Mask secrets in Hydra's YAML files in ``subfolder``, if there is one."""
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
        ConfigError: it cannot be composed; the message is that of :func:`cifar_exp.config.hydra_errors.explained`.
    """
    register_resolvers()
    quoted = str(Path(folder).resolve()).replace('"', '\\"') if folder else ""
    search = [f'hydra.searchpath=["file://{quoted}"]'] if folder else []
    try:
        with hydra_versions.composing(conf_dir()):
            config = compose("config", [*search, *overrides], return_hydra_config=True)
        check_typed_trust(config, overrides)
        return config
    except CifarExpError:
        raise
    except Exception as error:
        raise_swallowed()
        if (problem := explained(error, overrides)) is None:
            raise
        raise problem from error
