"""Hydra's sweeper for studies. It adds a parent run, a table of jobs and a report; a failed job does not end it."""

import gc
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cifar_exp.config.reading import read_section
from cifar_exp.config.schema import Devices, ReportSettings
from cifar_exp.errors import CifarExpError
from cifar_exp.records.run_folder import MULTIRUN_FILE
from cifar_exp.runs.parent_run import ParentRun
from cifar_exp.runs.sweep_summary import JobRow, common_tags, print_summary
from cifar_exp.system.atomic_files import write_atomically
from cifar_exp.system.bugs import as_user_error
from cifar_exp.system.printable import printable, tell
from cifar_exp.system.redaction import masked, masked_text

POWERS_OF_TWO = "powers_of_two"  # device counts of a preset: 1, 2, 4, ... up to the devices of this machine


class SweepFailedError(CifarExpError):
    """Some jobs failed. Each was reported when it failed. The exit code is that of the first failure."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code  # type: ignore[misc]


class StudySweeper(BasicSweeper):
    """Runs the cartesian product of the overrides under one parent run.

    A failing job is reported at once and the other jobs still run. At the end a table of all jobs is printed. If device
    counts differ, the speedup table is printed, too, and recorded in the parent run as metrics and files.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        reporting = partial(_run_and_report, task_function)
        super().setup(hydra_context=hydra_context, task_function=reporting, config=config)

    def sweep(self, arguments: list[str]) -> list[JobRow]:
        """Run all jobs.

        Args:
            arguments: the sweep's overrides.

        Returns:
            A row for each job.

        Raises:
            SweepFailedError: some jobs failed. It is raised after all jobs have ended.
            Stopped: SIGINT or SIGTERM; the remaining jobs are not started.
        """
        assert self.config is not None
        from cifar_exp.runs import sweep_resume

        jobs = self._jobs(arguments)  # compose all jobs before the first one starts
        wanted = Path(self.config.hydra.sweep.dir)
        with sweep_resume.claimed_sweep(wanted, self.config.resume, arguments) as sweep_dir:
            if (sweep_dir / MULTIRUN_FILE).exists() or sweep_dir != wanted:
                jobs = self._jobs(self._continue_in(sweep_dir, arguments))
            rows = self._sweep(sweep_dir, jobs)
            sweep_resume.end_sweep(sweep_dir)
        return rows

    def _sweep(self, sweep_dir: Path, jobs: list[list[str]]) -> list[JobRow]:
        assert self.config is not None
        from cifar_exp.study.finished_runs import folder_run

        composed = OmegaConf.create(masked(OmegaConf.to_container(self.config)))
        write_atomically(sweep_dir / MULTIRUN_FILE, OmegaConf.to_yaml(composed))
        tags = {"sweep": sweep_dir.as_posix(), "jobs": str(len(jobs))}
        with ParentRun(self.config, sweep_dir, tags) as parent:
            rows = self._run(jobs)
            finished = {row.number: run for row in rows if row.is_finished and (run := folder_run(row.run_dir))}
            settings = read_section(ReportSettings, self.config, "report")
            metrics, artifacts = print_summary(rows, finished, sweep_dir, settings, self.config.progress == "quiet")
            parent.log(metrics, [path.name for path in artifacts], common_tags(list(finished.values())))
            if parent.hint and self.config.progress != "quiet":
                print(f"compare: {parent.hint}")
            if failed := [row for row in rows if row.failure]:
                raise SweepFailedError(failed[0].exit_code)
        return rows

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
        """The overrides of each job. All jobs are composed, so a wrong setting is reported here."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        preset = self._preset(arguments)
        # An override replaces the preset's value for the same key. The preset's order of keys stays.
        self.overrides = self.split_arguments(parser.parse_overrides([*preset, *arguments]), None)
        jobs = [list(job) for job in self.overrides[0]]
        self.validate_batch_is_legal(jobs)
        return jobs

    def _preset(self, arguments: Sequence[str]) -> list[str]:
        """``hydra.sweeper.params`` as overrides. ``powers_of_two`` becomes device counts of this machine."""
        assert self.config is not None
        preset = dict(self.params or {})
        if preset.get("devices.count") == POWERS_OF_TWO:
            typed = any(argument.partition("=")[0] == "devices.count" for argument in arguments)
            preset["devices.count"] = "auto" if typed else ",".join(map(str, _counts(self.config)))
        return [f"{name}={value}" for name, value in preset.items()]

    def _run(self, jobs: list[list[str]]) -> list[JobRow]:
        assert self.launcher is not None
        # Hydra's own launcher keeps each job's whole configuration, 0.2 MB, until the last one has ended.
        size = 1 if isinstance(self.launcher, BasicLauncher) else self.max_batch_size or len(jobs)
        rows: list[JobRow] = []
        for start in range(0, len(jobs), size):
            done = self.launcher.launch(jobs[start : start + size], initial_job_idx=start)
            rows += [_row(start + number, job) for number, job in enumerate(done)]
            if start == 0:  # objects of the first job stay alive; frozen, they do not slow down later collections
                gc.collect()
                gc.freeze()
        return rows


def _counts(config: DictConfig) -> list[int]:
    from cifar_exp.launch.devices import device_counts

    return device_counts(read_section(Devices, config, "devices"))


def _run_and_report(task_function: TaskFunction, composed: DictConfig) -> Any:
    """Print a job's overrides, run it, and print the error if it fails."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    if composed.progress != "quiet":
        print(f"\n== job {hydra.job.num}: {printable(' '.join(masked(list(hydra.overrides.task))))}", flush=True)
    try:
        return task_function(composed)
    except CifarExpError as error:
        tell(masked_text(f"job {hydra.job.num} failed: {error}"))
        raise
    except Exception as error:
        problem = as_user_error(error)
        tell(masked_text(f"job {hydra.job.num} failed: {problem}"))
        raise problem from error


def _row(number: int, job: JobReturn) -> JobRow:
    assert job.hydra_cfg is not None
    failure = job._return_value if job.status == JobStatus.FAILED else None  # the property would raise and print
    if failure is not None:
        failure = failure.with_traceback(None)  # it was already reported, and it references all objects of the job
    return JobRow(number, masked(list(job.overrides or [])), Path(job.hydra_cfg.hydra.runtime.output_dir), failure)
