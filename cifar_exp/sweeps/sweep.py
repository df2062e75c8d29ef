"""Hydra's sweeper for studies. It adds a parent run, a table of jobs and a report; a failed job does not end it."""

import gc
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cifar_exp.config import hydra_versions
from cifar_exp.config.mlflow_settings import with_environment
from cifar_exp.config.reading import read_section
from cifar_exp.config.schema import Devices, ReportSettings
from cifar_exp.errors import CifarExpError, ConfigError, Stopped
from cifar_exp.records.refused_start import Before
from cifar_exp.records.run_folder import MULTIRUN_FILE
from cifar_exp.sweeps.joblib_jobs import end_idle_workers, saving_jobs
from cifar_exp.sweeps.search_study import STORAGE_FILE
from cifar_exp.sweeps.sweep_check import check_groups
from cifar_exp.sweeps.sweep_job import forget_config, row_of, run_and_report
from cifar_exp.sweeps.sweep_summary import JobRow, common_tags, print_summary
from cifar_exp.system.atomic_files import write_atomically
from cifar_exp.system.bugs import exit_code, forget_frames
from cifar_exp.system.printable import printable
from cifar_exp.system.redaction import masked

if TYPE_CHECKING:
    from cifar_exp.study.finished_runs import FinishedRun

POWERS_OF_TWO = "powers_of_two"  # device counts of a preset: 1, 2, 4, ... up to the devices of this machine


class SweepFailedError(CifarExpError):
    """Some jobs failed. Each was reported when it failed. The exit code is that of the first failure."""

    def __init__(self, failure: BaseException, jobs: Sequence[JobReturn]) -> None:
        super().__init__("")
        self.exit_code = exit_code(failure)  # type: ignore[misc]
        self.failure, self.jobs = failure, jobs


class StudySweeper(Sweeper):
    """Runs the cartesian product of the overrides under one parent run.

    A failing job is reported at once and the other jobs still run. At the end a table of all jobs is printed. If device
    counts differ, the speedup table is printed, too, and recorded in the parent run as metrics and files.

    It does not derive from Hydra's basic sweeper: Hydra executes that module again with each scan for plugins, and a
    class that was derived from it before cannot be built any more.
    """

    def __init__(self, max_batch_size: int | None = None, params: Mapping[str, Any] | None = None) -> None:
        """``max_batch_size``: jobs that the launcher gets at once, None for all. ``params``: overrides by name."""
        self.max_batch_size, self.params = max_batch_size, params or {}
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None
        self._task: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep Hydra's objects and make the launcher.

        ``task_function`` may have two methods that a plain function lacks. ``check(config)`` is called with the
        configuration of each job before the first one starts. ``sweep_failed(exit_code)`` is called in place of raising
        the first failure.
        """
        from hydra.core.plugins import Plugins

        self.hydra_context, self.config, self._task = hydra_context, config, task_function
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=partial(run_and_report, task_function), config=config
        )

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Run all jobs.

        Args:
            arguments: the sweep's overrides.

        Returns:
            The jobs in batches of ``max_batch_size``, as from Hydra's own sweeper.

        Raises:
            CifarExpError: every job was refused before the first one started.
            Exception: the first failure, unless the task function has a method ``sweep_failed``; all jobs have ended.
            Stopped: SIGINT or SIGTERM; the remaining jobs are not started.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        with hydra_versions.ending_sweep(self.hydra_context, self.config):
            try:
                jobs = self._claim_and_run(arguments)
            except SweepFailedError as failed:
                report_failure = getattr(self._task, "sweep_failed", None)
                if report_failure is None:
                    raise failed.failure  # noqa: B904
                report_failure(failed.exit_code)
                jobs = failed.jobs
        size = self.max_batch_size or len(jobs) or 1
        return [jobs[start : start + size] for start in range(0, len(jobs), size)]

    def _is_ours(self) -> bool:
        """Whether the configuration is this package's; other programs use the sweeper as a plugin of Hydra's."""
        return self.config is not None and "resume" in self.config

    def _claim_and_run(self, arguments: list[str]) -> Sequence[JobReturn]:
        assert self.config is not None
        assert self.hydra_context is not None
        jobs = self._jobs(arguments)
        self._check(jobs)
        wanted = Path(self.config.hydra.sweep.dir)
        if not self._is_ours():
            wanted.mkdir(parents=True, exist_ok=True)
            return self._sweep(wanted, jobs)
        from cifar_exp.sweeps import sweep_resume

        with (
            _removing_refused_sweep(wanted),
            sweep_resume.claimed_sweep(wanted, self.config.resume, arguments) as sweep_dir,
        ):
            if (sweep_dir / MULTIRUN_FILE).exists() or sweep_dir != wanted:
                jobs = self._jobs(self._continue_in(sweep_dir, arguments))
            done = self._sweep(sweep_dir, jobs)
            sweep_resume.end_sweep(sweep_dir)
        return done

    def _check(self, jobs: Sequence[Sequence[str]]) -> None:
        """Check the jobs before the first one starts: each by itself, all together by the launcher."""
        self._check_groups([jobs])

    def _check_groups(self, groups: Sequence[Sequence[Sequence[str]]]) -> None:
        """Check the jobs of each group; a group whose jobs are all refused ends the sweep before it starts."""
        assert self.config is not None
        assert self.hydra_context is not None
        is_checked = getattr(self._task, "check", None) or self._is_ours()
        check = self._check_job if is_checked else None
        check_groups(self.hydra_context, self.config, groups, check, getattr(self.launcher, "check", None))

    def _check_job(self, config: DictConfig) -> None:
        """Check the configuration of one job."""
        if check_job := getattr(self._task, "check", None):
            check_job(config)

    def _sweep(self, sweep_dir: Path, jobs: list[list[str]]) -> Sequence[JobReturn]:
        assert self.config is not None
        from cifar_exp.study.finished_runs import folder_run
        from cifar_exp.sweeps.parent_run import ParentRun

        container: Any = OmegaConf.to_container(self.config)
        if isinstance(container.get("tracking"), dict):  # for `sync`, perhaps without these variables
            container["tracking"] = with_environment(container["tracking"])
        composed = OmegaConf.create(masked(container))
        write_atomically(sweep_dir / MULTIRUN_FILE, OmegaConf.to_yaml(composed))
        tags = {"sweep": sweep_dir.as_posix(), "jobs": str(self._job_count(jobs))}
        quiet = OmegaConf.select(self.config, "progress", default="auto") == "quiet"
        with ParentRun(self.config, sweep_dir, tags) as parent:
            for line in [] if quiet else parent.lines:
                print(line, flush=True)
            done = self._run(jobs, sweep_dir)
            rows = self._rows(done)
            finished = {row.number: run for row in rows if row.is_finished and (run := folder_run(row.run_dir))}
            metrics, artifacts = self._summarize(rows, finished, sweep_dir, quiet)
            if parent.is_new and all(row.is_refused for row in rows):
                parent.discard()
            else:
                parent.log(metrics, [path.name for path in artifacts], common_tags(list(finished.values())))
                if parent.hint and not quiet:
                    print(f"compare: {parent.hint}")
            if failures := [row.failure for row in rows if row.failure]:
                raise SweepFailedError(failures[0], done)
        return done

    def _job_count(self, jobs: Sequence[Sequence[str]]) -> int:
        return len(jobs)

    def _rows(self, done: Sequence[JobReturn]) -> list[JobRow]:
        """The rows of the jobs that ran, from what Hydra returned for them."""
        return [row_of(number, job) for number, job in enumerate(done)]

    def _summarize(
        self, rows: Sequence[JobRow], finished: "dict[int, FinishedRun]", sweep_dir: Path, quiet: bool
    ) -> tuple[list[tuple[str, float, int]], list[Path]]:
        """Print the results. Returns metrics for the parent run as (name, value, step), and files for it."""
        assert self.config is not None
        from cifar_exp.study.speedup import SPEEDUP_ALONE

        is_set = "report" in self.config
        settings = read_section(ReportSettings, self.config, "report") if is_set else SPEEDUP_ALONE
        return print_summary(rows, finished, sweep_dir, settings, quiet)

    def _continue_in(self, sweep_dir: Path, arguments: Sequence[str]) -> list[str]:
        """Let the jobs run in ``sweep_dir`` with ``resume=auto``: finished jobs are skipped, others are resumed.

        Returns:
            The overrides of the resumed sweep.
        """
        assert self.config is not None
        # Hydra 1.4 passes its own section with a read-only flag on each node.
        with read_write(self.config.hydra), open_dict(self.config.hydra):
            self.config.hydra.sweep.dir = str(sweep_dir)
            escaped = str(sweep_dir).replace("\\", "\\\\").replace("'", "\\'")
            self.config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{escaped}'")
        if self.config.progress != "quiet":
            print(f"{printable(sweep_dir)}: the sweep continues", flush=True)
        return [*(argument for argument in arguments if not argument.startswith("resume=")), "resume=auto"]

    def _jobs(self, arguments: list[str]) -> list[list[str]]:
        """The overrides of each job: the cartesian product, whose last override varies fastest."""
        choices: dict[str, list[str]] = {}
        # An override replaces the preset's value for the same key. The preset's order of keys stays.
        for override in self._parsed(arguments):
            key = override.get_key_element()
            if override.value_type is None:  # ~key: whatever its value is
                choices[key] = [key]
            elif not override.is_sweep_override():
                choices[key] = [f"{key}={override.get_value_element_as_str()}"]
            elif override.is_discrete_sweep():
                choices[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            else:
                raise ConfigError(
                    f"{override.input_line}: an interval is not a list of values. Set {key}=a,b,c or "
                    f"{key}=range(a,b,c), or hydra/sweeper=search to search it"
                )
        return [list(job) for job in itertools.product(*choices.values())]

    def _parsed(self, arguments: Sequence[str]) -> list[Override]:
        """The overrides of the preset, then those of the command line."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        return parser.parse_overrides([*self._preset(arguments), *arguments])

    def _preset(self, arguments: Sequence[str]) -> list[str]:
        """``hydra.sweeper.params`` as overrides. ``powers_of_two`` becomes device counts of this machine."""
        assert self.config is not None
        preset = dict(self.params)
        if preset.get("devices.count") == POWERS_OF_TWO:
            typed = any(argument.partition("=")[0] == "devices.count" for argument in arguments)
            if not typed and getattr(self.launcher, "is_remote", False):
                raise ConfigError(
                    "devices.count: the preset has all counts up to the devices of this machine, and the jobs run on "
                    "others. Set devices.count=1,2,4"
                )
            preset["devices.count"] = "auto" if typed else ",".join(map(str, _counts(self.config)))
        return [f"{name}={value}" for name, value in preset.items()]

    def _run(self, jobs: list[list[str]], sweep_dir: Path) -> list[JobReturn]:
        from hydra._internal.core_plugins.basic_launcher import BasicLauncher  # Hydra executes this module again

        assert self.launcher is not None
        # One by one with Hydra's own launcher, which would go on after a signal.
        is_here = isinstance(self.launcher, BasicLauncher)
        size = 1 if is_here else self.max_batch_size or len(jobs)
        processes = getattr(self.launcher, "processes_to_stop", None)
        done: list[JobReturn] = []
        for start in range(0, len(jobs), size):
            with nullcontext() if is_here else saving_jobs(sweep_dir, processes):
                done += self.launcher.launch(jobs[start : start + size], initial_job_idx=start)
            for job in done[start:]:
                if job.status == JobStatus.FAILED:
                    if stopped := Stopped.cause_of(job._return_value):
                        raise stopped
                    forget_frames(job._return_value)  # they reference all objects of the job
                if self._is_ours():  # another program may read the configurations of the jobs
                    forget_config(job)
            if start == 0:  # objects of the first job stay alive; frozen, they do not slow down later collections
                gc.collect()
                gc.freeze()
        end_idle_workers()
        getattr(self.launcher, "end_processes", lambda: None)()
        return done


@contextmanager
def _removing_refused_sweep(sweep_dir: Path) -> Iterator[None]:
    """Remove the folder of a new sweep if all of its jobs were refused."""
    from cifar_exp.sweeps.sweep_resume import SWEEP_FILE

    before = Before.of(sweep_dir)
    try:
        yield
    except SweepFailedError as failed:
        if all(row_of(number, job).is_refused for number, job in enumerate(failed.jobs)):
            before.restore([SWEEP_FILE, MULTIRUN_FILE, STORAGE_FILE])
        raise


def _counts(config: DictConfig) -> list[int]:
    from cifar_exp.launch.devices import device_counts

    return device_counts(read_section(Devices, config, "devices"))
