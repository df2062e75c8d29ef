"""Hydra's sweeper for studies: a parent run, failures that do not end the sweep, a table, the speedup report."""

import gc
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cifar_exp import journal
from cifar_exp.config import build_tracker
from cifar_exp.errors import FREE_SPACE, CifarExpError, Stopped, StorageError, TrackingError, storage_errors
from cifar_exp.privacy import masked, masked_text
from cifar_exp.record import MULTIRUN_FILE, SWEEP_RUN_FILE, Outcome, RunInfo
from cifar_exp.schema import Report

if TYPE_CHECKING:
    from rich.console import Console

    from cifar_exp.record import Status
    from cifar_exp.study import FinishedRun


POWERS_OF_TWO = "powers_of_two"  # what a preset says for the device counts: up to what the machine has


class SweepFailedError(CifarExpError):
    """Some jobs failed; each was reported when it did. The exit code is the first failure's."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code  # type: ignore[misc]


@dataclass(frozen=True)
class JobRow:
    """One job of a sweep in its closing table."""

    number: int
    overrides: Sequence[str]
    run_dir: Path
    failure: BaseException | None

    @property
    def is_finished(self) -> bool:
        """Whether it was trained to the end; a tracker that failed loses nothing."""
        return self.failure is None or isinstance(self.failure, TrackingError)

    @property
    def exit_code(self) -> int:
        return getattr(self.failure, "exit_code", 1) if self.failure else 0


class StudySweeper(BasicSweeper):
    """Runs the cartesian product of the overrides under one parent run.

    A failing job is reported at once and the others go on; then a table of all jobs is printed and, where device
    counts differ, the speedup table, which the parent run keeps as metrics and files too.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        told = partial(_run_and_tell, task_function)
        super().setup(hydra_context=hydra_context, task_function=told, config=config)

    def sweep(self, arguments: list[str]) -> list[JobRow]:
        """Run all jobs.

        Raises:
            SweepFailedError: where jobs failed, after the others have ended.
            Stopped: on SIGINT and SIGTERM; jobs that had not begun are left out.
        """
        assert self.config is not None
        from cifar_exp import resume

        jobs = self._jobs(arguments)  # all of them compose, or nothing is begun
        wanted = Path(self.config.hydra.sweep.dir)
        with resume.claimed_sweep(wanted, self.config.resume, arguments) as sweep_dir:
            if (sweep_dir / MULTIRUN_FILE).exists() or sweep_dir != wanted:
                jobs = self._jobs(self._continue_in(sweep_dir, arguments))
            rows = self._sweep(sweep_dir, jobs)
            resume.end_sweep(sweep_dir)
        return rows

    def _sweep(self, sweep_dir: Path, jobs: list[list[str]]) -> list[JobRow]:
        assert self.config is not None
        from cifar_exp.report import folder_run

        OmegaConf.save(OmegaConf.create(masked(OmegaConf.to_container(self.config))), sweep_dir / MULTIRUN_FILE)
        tags = {"sweep": sweep_dir.as_posix(), "jobs": str(len(jobs))}
        with ParentRun(self.config, sweep_dir, tags) as parent:
            rows = self._run(jobs)
            finished = {row.number: run for row in rows if row.is_finished and (run := folder_run(row.run_dir))}
            settings = Report(**OmegaConf.to_container(self.config.report, resolve=True))  # type: ignore[arg-type]
            metrics, artifacts = _summarize(rows, finished, sweep_dir, settings, self.config.progress == "quiet")
            parent.log(metrics, [path.name for path in artifacts], _common_tags(list(finished.values())))
            if parent.hint and self.config.progress != "quiet":
                print(f"compare: {parent.hint}")
            if failed := [row for row in rows if row.failure]:
                raise SweepFailedError(failed[0].exit_code)
        return rows

    def _continue_in(self, sweep_dir: Path, arguments: Sequence[str]) -> list[str]:
        """Let each job find its own folder in the sweep's: what is finished is skipped, what is not goes on."""
        assert self.config is not None
        with read_write(self.config), open_dict(self.config):
            self.config.hydra.sweep.dir = str(sweep_dir)
            escaped = str(sweep_dir).replace("\\", "\\\\").replace("'", "\\'")
            self.config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{escaped}'")
        if self.config.progress != "quiet":
            print(f"{sweep_dir}: the sweep goes on", flush=True)
        return [*(argument for argument in arguments if not argument.startswith("resume=")), "resume=auto"]

    def _jobs(self, arguments: list[str]) -> list[list[str]]:
        """The overrides of each job, all of which compose."""
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        preset = self._preset(arguments)
        # What is typed takes the place of the preset's value for the same key, so the preset's order of keys stays.
        self.overrides = self.split_arguments(parser.parse_overrides([*preset, *arguments]), None)
        jobs = [list(job) for job in self.overrides[0]]
        self.validate_batch_is_legal(jobs)
        return jobs

    def _preset(self, arguments: Sequence[str]) -> list[str]:
        """``hydra.sweeper.params`` as overrides; device counts that nobody typed are this machine's."""
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
            if start == 0:  # what is there after the first job stays: what later ones leave is found among little else
                gc.collect()
                gc.freeze()
        return rows


class ParentRun:
    """The sweep's parent run, a record on disk like any other run's.

    The first job that opens in the tracker opens the parent there; the rest is passed on at the end, so that no job
    ever waits for a tracker.
    """

    def __init__(self, config: DictConfig, sweep_dir: Path, tags: Mapping[str, str]) -> None:
        tracker = build_tracker(config)
        self.hint = tracker.hint()  # what to type to look at the sweep
        new = RunInfo(f"sweep {sweep_dir.name}", sweep_dir, {}, tags, time.time())
        self._info = RunInfo.load(sweep_dir) if (sweep_dir / SWEEP_RUN_FILE).exists() else new
        self._info.save_sweep()
        self._tracker = tracker
        Outcome.forget(sweep_dir)

    def log(self, metrics: Sequence[tuple[str, float, int]], artifacts: Sequence[str], tags: Mapping[str, str]) -> None:
        """Metrics as (name, value, step), files of the sweep's folder, and tags."""
        self._info = replace(self._info, artifacts=artifacts, tags={**self._info.tags, **tags})
        self._info.save_sweep()
        known = set()
        with suppress(ValueError, KeyError, TypeError, AttributeError):  # a damaged one is written again
            entries = journal.read(self._info.run_dir)
            known = {(name, value, entry.step) for entry in entries for name, value in entry.metrics.items()}
        if known == set(metrics):  # a sweep that went on and found all as it was: the same points, not newer ones
            return
        (self._info.run_dir / journal.FILE_NAME).unlink(missing_ok=True)  # the whole summary is written again
        if not metrics:
            return
        writer = journal.JournalWriter(self._info.run_dir)
        elapsed = time.time() - self._info.started
        for step in sorted({step for _, _, step in metrics}):
            values = {name: value for name, value, there in metrics if there == step}
            writer.write(journal.Entry(step, 0, elapsed, values))
        writer.close()

    def __enter__(self) -> "ParentRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the run as FINISHED, FAILED or KILLED.

        Raises:
            TrackingError: where all jobs went well, but the tracker did not get everything.
        """
        from cifar_exp.recording import LEAST_PATIENCE, LONGEST, PATIENCE, STOPPED_PATIENCE, Follower, lacking

        stopped = kind is not None and issubclass(kind, Stopped)
        status: Status = "FINISHED" if kind is None else "KILLED" if stopped else "FAILED"
        try:
            with storage_errors(self._info.run_dir, FREE_SPACE):
                Outcome(status, time.time()).save(self._info.run_dir)
        except StorageError:
            if error is None:
                raise
        sink = self._tracker.sink(self._info)
        if sink is None:
            return
        follower = Follower(self._info.run_dir, sink, interval=PATIENCE)
        follower.start()
        if isinstance(error, Stopped):
            left = max(LEAST_PATIENCE, error.received + STOPPED_PATIENCE - time.monotonic())
            follower.finish(status, left, longest=left)
        else:
            follower.finish(status, PATIENCE, LONGEST)
        if follower.error:
            told = f"tracking.uri: of the sweep's parent run {lacking(follower.error, self._info.run_dir)}"
            if error is None:
                raise TrackingError(told)
            print(f"cifar-exp: {told}", file=sys.stderr, flush=True)


def _counts(config: DictConfig) -> list[int]:
    from cifar_exp.launch import device_counts
    from cifar_exp.schema import Devices

    return device_counts(Devices(accelerator=config.devices.accelerator, threads=config.devices.threads))


def _run_and_tell(task_function: TaskFunction, composed: DictConfig) -> Any:
    """One job between two lines that say what it is and, at once, why it failed."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    if composed.progress != "quiet":
        print(f"\n== job {hydra.job.num}: {' '.join(masked(list(hydra.overrides.task)))}", flush=True)
    try:
        return task_function(composed)
    except CifarExpError as error:
        print(masked_text(f"cifar-exp: job {hydra.job.num} failed: {error}"), file=sys.stderr, flush=True)
        raise
    except Exception:
        told = masked_text(traceback.format_exc())
        print(f"cifar-exp: job {hydra.job.num} failed:\n{told}", file=sys.stderr, flush=True)
        raise


def _row(number: int, job: JobReturn) -> JobRow:
    assert job.hydra_cfg is not None
    failure = job._return_value if job.status == JobStatus.FAILED else None  # the property would raise and print
    if failure is not None:
        failure = failure.with_traceback(None)  # it was shown, and holds on to the whole job
    return JobRow(number, masked(list(job.overrides or [])), Path(job.hydra_cfg.hydra.runtime.output_dir), failure)


def _common_tags(runs: "Sequence[FinishedRun]") -> dict[str, str]:
    """The device counts and accelerators of a sweep's jobs, as tags of the parent."""
    values = {name: {run.tags[name] for run in runs} for name in ("devices", "accelerator")}
    return {name: ",".join(sorted(found)) for name, found in values.items() if found}


def _summarize(
    rows: Sequence[JobRow], finished: "dict[int, FinishedRun]", sweep_dir: Path, settings: Report, quiet: bool
) -> tuple[list[tuple[str, float, int]], list[Path]]:
    """Print the jobs and the speedup; the parent run's metrics and files."""
    from rich.console import Console

    from cifar_exp.study import Study

    console = Console(quiet=quiet)
    _print_jobs(console, rows, finished)
    unfinished = [f"{' '.join(row.overrides)}: {_reason(row)}" for row in rows if not row.is_finished]
    study = Study.of(list(finished.values()), settings, unfinished)
    if left_out := sum(run.tags.get("oversubscribed") == "true" for run in finished.values()):
        console.print(f"{left_out} oversubscribed run(s) are left out: ranks that share a core say nothing of speedup")
    if study is None:
        return [], []
    study.print(console)
    artifacts = study.write(sweep_dir)
    console.print(f"written: {', '.join(map(str, artifacts))}", highlight=False, soft_wrap=True)
    return study.metrics(), artifacts


def _reason(row: JobRow) -> str:
    """Why a job failed, in a line."""
    told = masked_text(str(row.failure)).splitlines()[0] if str(row.failure) else type(row.failure).__name__
    return f"failed ({row.exit_code}): {told}"


def _print_jobs(console: "Console", rows: Sequence[JobRow], finished: "dict[int, FinishedRun]") -> None:
    from rich.table import Table

    common = set.intersection(*(set(row.overrides) for row in rows))
    table = Table("job", "overrides", "result", title="Jobs", title_justify="left")
    table.add_column("test accuracy", justify="right")
    table.add_column("images/s", justify="right")
    table.add_column("seconds", justify="right")
    for row in rows:
        overrides = " ".join(override for override in row.overrides if override not in common)
        if not row.is_finished:
            table.add_row(str(row.number), overrides, _reason(row))
            continue
        metrics = finished[row.number].metrics if row.number in finished else {}
        figures = [
            f"{metrics[name]:{form}}" if name in metrics else ""
            for name, form in (
                ("test/accuracy", ".4f"),
                ("steady_images_per_second", ",.0f"),
                ("time/total_seconds", ".1f"),
            )
        ]
        table.add_row(str(row.number), overrides, "done, not recorded" if row.failure else "done", *figures)
    console.print(table)
