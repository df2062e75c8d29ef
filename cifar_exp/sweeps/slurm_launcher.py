"""Hydra's launcher for Slurm: each job of a sweep becomes a Slurm job with the devices that it needs."""

import copy
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cifar_exp.config.defaults import flattened
from cifar_exp.config.reading import read_section
from cifar_exp.config.schema import Devices
from cifar_exp.config.slurm_settings import SECTION, Resources, SlurmSettings, resources
from cifar_exp.errors import ConfigError, MachineError
from cifar_exp.sweeps.slurm_job import SlurmJob
from cifar_exp.system import slurm
from cifar_exp.system.redaction import masked
from cifar_exp.system.signals import blocked_signals

if TYPE_CHECKING:
    from submitit import Job


@dataclass
class Submission:
    """One job of the sweep.

    Attributes:
        number: its number in the sweep.
        overrides: its overrides.
        folder: its run folder.
        resources: its cores and GPUs.
        job: its Slurm job, as submitit sees it; None before it is submitted.
        refusal: why Slurm refused to take it.
    """

    number: int
    overrides: Sequence[str]
    folder: Path
    resources: Resources
    job: "Job[JobReturn] | None" = None
    refusal: ConfigError | None = None


class SlurmLauncher(Launcher):
    """Submits the jobs of a sweep to Slurm through submitit, and waits until they have ended.

    Jobs with equal resources form one job array. A job that Slurm ended without a result fails; the others go on.
    """

    is_remote = True  # the devices of this host say nothing about those of the jobs

    def __init__(self, **settings: Any) -> None:
        """``settings``: those of :class:`SlurmSettings`; they are checked when they are needed."""
        self._given = settings
        self.config: DictConfig | None = None
        self.task_function: TaskFunction | None = None
        self.hydra_context: HydraContext | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep Hydra's objects."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def check(self, jobs: Sequence[Sequence[str]], configs: Sequence[DictConfig]) -> None:  # noqa: ARG002
        """Check the settings for all jobs of a sweep before anything is written.

        Args:
            jobs: the overrides of each job.
            configs: the section ``devices`` of each.

        Raises:
            CifarExpError: a setting is wrong, or submitit or Slurm is missing here.
        """
        self._settings()
        self._submissions(jobs, 0)
        self._refuse_secrets()
        if shutil.which("sbatch") is None:
            raise MachineError(
                "hydra/launcher=slurm: there is no sbatch on this host. Start the sweep on a host from which jobs are "
                "submitted, or leave out hydra/launcher"
            )
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise MachineError(
                "hydra/launcher=slurm: submitit is not installed. Run pip install 'cifar-exp[slurm]'"
            ) from None

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit the jobs and wait for them.

        Args:
            job_overrides: the overrides of each job.
            initial_job_idx: the number of the first job.

        Returns:
            The result of each job, in this order.

        Raises:
            Stopped: a signal; the jobs were cancelled. Slurm sends them SIGTERM, and they save.
        """
        from cifar_exp.sweeps.slurm_results import cancelled_on_stop, results

        assert self.config is not None
        settings = self._settings()
        submissions = self._submissions(job_overrides, initial_job_idx)
        sweep_dir = Path(str(self.config.hydra.sweep.dir)).absolute()
        sweep_dir.mkdir(parents=True, exist_ok=True)
        # New and private: the results in it are pickles.
        folder = Path(tempfile.mkdtemp(prefix="slurm-", dir=sweep_dir))
        with cancelled_on_stop(submissions, sweep_dir):
            self._submit(submissions, settings, folder, sweep_dir)
            if all(one.job is None for one in submissions):
                shutil.rmtree(folder)
            return results(submissions)

    def _settings(self) -> SlurmSettings:
        section = OmegaConf.create({SECTION: dict(self._given)})
        settings = read_section(SlurmSettings, section, SECTION)
        settings.check()
        return settings

    def _refuse_secrets(self) -> None:
        """Refuse a configuration with a password: submitit writes the configuration to files."""
        plain: Any = OmegaConf.to_container(self.config)
        settings, shown = flattened(plain), flattened(masked(plain))
        for name in settings:
            if settings[name] != shown[name]:
                raise ConfigError(
                    f"{name}: it holds a password, which would be written to files for Slurm. Leave it out, and set it "
                    f"by a variable of the environment, such as MLFLOW_TRACKING_PASSWORD"
                )

    def _submissions(self, jobs: Sequence[Sequence[str]], first: int) -> list[Submission]:
        """The jobs with their folders and resources.

        Raises:
            ConfigError: what a job needs cannot be told.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        settings = self._settings()
        submissions = []
        for number, overrides in enumerate(jobs, first):
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            folder = _folder(config, number)
            devices = read_section(Devices, config, "devices")
            needed = resources(settings, devices)
            submissions.append(Submission(number, overrides, folder, needed))
        return submissions

    def _submit(
        self, submissions: Sequence[Submission], settings: SlurmSettings, folder: Path, sweep_dir: Path
    ) -> None:
        """Submit each group of jobs with equal resources as one array."""
        from submitit.core.utils import UncompletedJobError
        from submitit.slurm.slurm import SlurmExecutor

        task, state = self._task(settings, sweep_dir), Singleton.get_state()
        for needed in dict.fromkeys(submission.resources for submission in submissions):
            alike = [submission for submission in submissions if submission.resources == needed]
            executor = SlurmExecutor(folder, max_num_timeout=settings.max_requeues)
            executor.update_parameters(**_parameters(settings, needed))
            arguments = zip(*((list(one.overrides), one.number, state) for one in alike), strict=True)
            try:
                with slurm.outside_of_job(), blocked_signals():  # so that every submitted job is known
                    jobs = executor.map_array(task, *arguments)
            except UncompletedJobError as error:  # submitit's, for a command that failed
                refusal = ConfigError(f"hydra/launcher=slurm: sbatch refused {len(alike)} x {needed}: {_reason(error)}")
                for submission in alike:
                    submission.refusal = refusal
                continue
            for submission, job in zip(alike, jobs, strict=True):
                submission.job = job
            print(f"submitted as Slurm job {jobs[0].job_id.partition('_')[0]}: {len(jobs)} x {needed}", flush=True)

    def _task(self, settings: SlurmSettings, sweep_dir: Path) -> SlurmJob:
        """What each Slurm job calls. Its configuration names the sweep's folder, which may hold the time, as text."""
        assert self.config is not None
        assert self.hydra_context is not None
        assert self.task_function is not None
        config = copy.deepcopy(self.config)
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.sweep.dir = str(sweep_dir)
        return SlurmJob(self.hydra_context, self.task_function, config, settings.max_requeues)


def _parameters(settings: SlurmSettings, needed: Resources) -> dict[str, Any]:
    """Everything that the array of these jobs asks of Slurm, by submitit's names."""
    named = ("partition", "account", "qos", "constraint", "nodelist", "exclude")
    values: dict[str, Any] = {name: value for name in named if (value := getattr(settings, name)) is not None}
    if settings.mem_gb is not None:
        values["mem"] = f"{math.ceil(settings.mem_gb * 1024)}M"
    if settings.exclusive:
        values["exclusive"] = True
    values |= {"job_name": "cifar-exp", "time": settings.time, "nodes": 1, "ntasks_per_node": 1}
    values |= {"array_parallelism": settings.array_parallelism, "signal_delay_s": settings.save_seconds}
    # Some clusters requeue a job only if it asks for that.
    values |= {"stderr_to_stdout": True, "additional_parameters": {"requeue": True}}
    return values | needed.parameters(settings)


def _reason(error: Exception) -> str:
    """The last line of what ``sbatch`` printed."""
    lines = [line.removeprefix("sbatch: error: ") for line in str(error).splitlines() if line.startswith("sbatch: ")]
    return (
        f"{(lines or [str(error)])[-1]}. Set hydra.launcher.<setting>: see cifar-exp hydra/launcher=slurm --cfg hydra"
    )


def _folder(config: DictConfig, number: int) -> Path:
    """The run folder of job ``number``."""
    state = HydraConfig.instance()
    before = state.cfg
    try:
        with open_dict(config.hydra.job):
            config.hydra.job.num, config.hydra.job.id = number, str(number)
        state.set_config(config)
        return Path(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir)).absolute()
    finally:
        state.cfg = before
