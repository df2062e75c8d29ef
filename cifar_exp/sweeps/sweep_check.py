"""Check the jobs of a sweep before the first one starts."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cifar_exp.errors import CifarExpError, ConfigError, MachineError

Check = Callable[[DictConfig], None]


def check_groups(
    context: HydraContext,
    config: DictConfig,
    groups: Sequence[Sequence[Sequence[str]]],
    check_job: Check | None,
    check_all: Callable[[Sequence[Sequence[str]], Sequence[DictConfig]], None] | None,
) -> None:
    """Check the jobs of each group as :func:`check_jobs` does, and then all together.

    Args:
        context: Hydra's context, which has the configuration loader.
        config: the sweep's configuration.
        groups: of jobs, each its overrides.
        check_job: called with each job's configuration.
        check_all: the launcher's check: called with all jobs and with the section ``devices`` of each.
    """
    checked: list[DictConfig] = []

    def check(job: DictConfig) -> None:
        if check_job:
            check_job(job)
        if check_all and "devices" in job:
            checked.append(OmegaConf.masked_copy(job, "devices"))

    for group in groups:
        check_jobs(context, config, group, check if check_job or check_all else None)
    if check_all:
        check_all([job for group in groups for job in group], checked)


def check_jobs(context: HydraContext, config: DictConfig, jobs: Sequence[Sequence[str]], check: Check | None) -> None:
    """Compose the configuration of each job, so that a wrong setting is reported before the first one starts.

    Args:
        context: Hydra's context, which has the configuration loader.
        config: the sweep's configuration.
        jobs: the overrides of each job.
        check: called with each job's configuration; raises a ``CifarExpError``. None: only compose.

    Raises:
        CifarExpError: the first error, if all jobs are refused or one raises MachineError. Otherwise the sweep starts,
            and each refused job is reported in its turn.
    """
    refusals: list[CifarExpError] = []
    folders: dict[Path, int] = {}
    for number, overrides in enumerate(jobs):
        job = context.config_loader.load_sweep_config(config, list(overrides))
        try:
            if check:
                _check_folder(folders, _call(check, job, number), number)
        except SharedFolderError:
            raise
        except MachineError:
            raise
        except CifarExpError as error:
            refusals.append(error)
    if refusals and len(refusals) == len(jobs):
        raise refusals[0]


def folder_of(context: HydraContext, config: DictConfig, overrides: Sequence[str], number: int) -> Path:
    """The folder of a job, in that of the sweep."""
    job = context.config_loader.load_sweep_config(config, list(overrides))
    return Path(str(config.hydra.sweep.dir)) / _call(lambda _settings: None, job, number)


class SharedFolderError(ConfigError):
    """Two jobs of a sweep have the same folder."""


def _check_folder(folders: dict[Path, int], folder: Path, number: int) -> None:
    """Note the folder of a job.

    Raises:
        SharedFolderError: an earlier job has the same one.
    """
    first = folders.setdefault(folder, number)
    if first != number:
        raise SharedFolderError(
            f"hydra.sweep.subdir={folder}: jobs {first} and {number} would have the same folder. Set "
            f"'hydra.sweep.subdir=${{hydra.job.num}}', or leave it out"
        )


def _call(check: Check, job: DictConfig, number: int) -> Path:
    """Call ``check`` with the configuration of the job. Interpolations of Hydra's settings can be resolved.

    Returns:
        The folder of the job in that of the sweep, whose name may have changed since: it may hold the time.
    """
    state = HydraConfig.instance()
    before = state.cfg
    settings = copy.deepcopy(job)
    try:
        with read_write(job.hydra.job), open_dict(job.hydra.job):
            job.hydra.job.num, job.hydra.job.id = number, str(number)
        state.set_config(job)
        folder = Path(str(job.hydra.sweep.dir), str(job.hydra.sweep.subdir))
        with read_write(job.hydra.runtime), open_dict(job.hydra.runtime):
            job.hydra.runtime.output_dir = str(folder.absolute())
        state.set_config(job)
        with read_write(settings), open_dict(settings):
            del settings["hydra"]
        check(settings)
        return folder.relative_to(str(job.hydra.sweep.dir))
    finally:
        state.cfg = before
