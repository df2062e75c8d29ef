"""Hydra's sweeper that searches: Optuna chooses the settings of each job from the accuracies of the earlier ones."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from cifar_exp.config.result_settings import bears_on_result
from cifar_exp.errors import ConfigError, Stopped, TrackingError
from cifar_exp.records import journal
from cifar_exp.sweeps.joblib_jobs import end_idle_workers, saving_jobs
from cifar_exp.sweeps.packed_launcher import PackedLauncher
from cifar_exp.sweeps.search_pruning import METRIC, Pruning
from cifar_exp.sweeps.search_report import best_of, report
from cifar_exp.sweeps.search_space import Space
from cifar_exp.sweeps.search_study import (
    EPOCHS,
    REASON,
    SECONDS,
    TEST_ACCURACY,
    SearchSettings,
    SearchStudy,
    check_optuna,
)
from cifar_exp.sweeps.sweep import StudySweeper
from cifar_exp.sweeps.sweep_check import folder_of
from cifar_exp.sweeps.sweep_job import forget_config, row_of
from cifar_exp.sweeps.sweep_summary import JobRow
from cifar_exp.system.bugs import described, forget_frames
from cifar_exp.system.redaction import masked, masked_text

if TYPE_CHECKING:
    from cifar_exp.study.finished_runs import FinishedRun

PACKED = ".PackedLauncher"


class SearchSweeper(StudySweeper):
    """Runs ``n_trials`` jobs under one parent run. The aim is a high validation accuracy, never test accuracy.

    An override with several values is searched; the others are the same in all trials. A trial that is worse than the
    median of the others after the same epoch is stopped.
    """

    def __init__(self, params: Mapping[str, Any] | None = None, **settings: Any) -> None:
        """``params``: overrides by name, as in Hydra's own sweeper. ``settings``: see :class:`SearchSettings`."""
        super().__init__(None, params)
        self._typed = settings
        self._space: Space | None = None
        self._study: SearchStudy | None = None
        self._done: dict[int, JobReturn] = {}
        self._lock = threading.Lock()

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep Hydra's objects and make the launcher.

        Raises:
            ConfigError: Optuna is not installed, or the program is not this package's.
        """
        check_optuna()
        self._settings = SearchSettings(**self._typed)
        if self._settings.n_jobs > 1 and not OmegaConf.select(config, "hydra.launcher._target_").endswith(PACKED):
            raise ConfigError(
                f"hydra.sweeper.n_jobs={self._settings.n_jobs}: trials run side by side only with "
                f"hydra/launcher=packed. Set it, too, or start the same command several times on one "
                f"hydra.sweeper.storage"
            )
        if "resume" not in config or "data" not in config:
            raise ConfigError("hydra/sweeper=search: it searches with the settings of cifar-exp. Set another sweeper")
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def _jobs(self, arguments: list[str]) -> list[list[str]]:
        """Two jobs for the check: with the first and with the last value of each searched setting."""
        self._space = Space.of(self._parsed(arguments))
        return self._space.ends()

    def _check(self, jobs: Sequence[Sequence[str]]) -> None:
        """Check both jobs: unlike in a sweep, one that is refused ends the search before it starts."""
        assert self.config is not None
        self._check_groups([[job] for job in jobs])
        if self._settings.storage:  # a database that cannot be used is reported before the folder is made
            self._opened(Path(str(self.config.hydra.sweep.dir)))

    def _check_job(self, config: DictConfig) -> None:
        super()._check_job(config)
        if not OmegaConf.select(config, "data.validation"):
            raise ConfigError(
                "data.validation=0: a search compares its trials by their accuracy on validation images. The test "
                "images must not choose anything. Set data.validation=0.1"
            )

    def _job_count(self, jobs: Sequence[Sequence[str]]) -> int:  # noqa: ARG002
        return self._settings.n_trials

    def _run(self, jobs: list[list[str]], sweep_dir: Path) -> list[JobReturn]:  # noqa: ARG002
        self._study = self._opened(sweep_dir)
        with Pruning(self._study) as pruning:
            if isinstance(self.launcher, PackedLauncher):
                self._run_side_by_side(self.launcher, pruning, sweep_dir)
            else:
                self._run_trials(pruning)
        end_idle_workers()
        return [self._done[number] for number in sorted(self._done)]

    def _opened(self, sweep_dir: Path) -> SearchStudy:
        assert self._space is not None
        fixed = [word for word in self._space.fixed if bears_on_result(word.partition("=")[0].lstrip("+~"))]
        return SearchStudy(self._settings, sweep_dir, self._space, sorted(masked(fixed)))

    def _run_side_by_side(self, launcher: PackedLauncher, pruning: Pruning, sweep_dir: Path) -> None:
        count = self._settings.n_jobs
        with saving_jobs(sweep_dir, launcher.processes_to_stop), ThreadPoolExecutor(count) as threads:
            try:
                for worker in [threads.submit(self._run_trials, pruning) for _ in range(count)]:
                    worker.result()
            except BaseException:
                launcher.processes_to_stop()
                raise
            finally:
                launcher.end_processes()

    def _run_trials(self, pruning: Pruning) -> None:
        """Run trials until the study has enough."""
        assert self._study is not None
        while found := self._study.next_trial():
            trial, overrides, was_interrupted = found
            self._run_trial(trial, _resumed(overrides) if was_interrupted else overrides, pruning)

    def _run_trial(self, trial: Any, overrides: list[str], pruning: Pruning) -> None:
        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        with self._lock:
            folder = folder_of(self.hydra_context, self.config, overrides, trial.number)
        pruning.begin(trial, folder)
        (job,) = self.launcher.launch([overrides], initial_job_idx=trial.number)
        reason = pruning.end(trial)
        failure = job._return_value if job.status == JobStatus.FAILED else None
        if stopped := Stopped.cause_of(failure):
            raise stopped  # the trial stays open, and the next start continues it
        forget_frames(failure)
        forget_config(job)
        self._done[trial.number] = job
        self._tell(trial, folder, failure, reason)

    def _tell(self, trial: Any, folder: Path, failure: BaseException | None, reason: str) -> None:
        assert self._study is not None
        if failure is not None and not isinstance(failure, TrackingError):  # the latter has its results on disk
            why = masked_text(str(failure)).splitlines() or [described(failure)]
            self._study.tell(trial, "FAIL", None, {REASON: why[0]})
            return
        entries = journal.read(folder)
        metrics = journal.last_values(folder)
        facts: dict[str, Any] = {
            EPOCHS: entries[-1].epoch,
            SECONDS: metrics.get("time/total_seconds"),
            TEST_ACCURACY: metrics.get("test/accuracy"),
            REASON: reason,
        }
        self._study.tell(trial, "PRUNED" if reason else "COMPLETE", metrics[METRIC], facts)
        if self.config is not None and self.config.progress != "quiet":
            best = best_of(self._study.trials())
            so_far = f" (best {best.value:.4f}, trial {best.number})" if best else ""
            print(f"trial {trial.number}: {reason or f'validation accuracy {metrics[METRIC]:.4f}'}{so_far}", flush=True)

    def _rows(self, done: Sequence[JobReturn]) -> list[JobRow]:
        return [row_of(number, job) for number, job in zip(sorted(self._done), done, strict=True)]

    def _summarize(
        self,
        rows: Sequence[JobRow],  # noqa: ARG002
        finished: "dict[int, FinishedRun]",  # noqa: ARG002
        sweep_dir: Path,
        quiet: bool,
    ) -> tuple[list[tuple[str, float, int]], list[Path]]:
        assert self._study is not None
        return report(self._study, sweep_dir, quiet)


def _resumed(overrides: Sequence[str]) -> list[str]:
    return [*(word for word in overrides if not word.startswith("resume=")), "resume=auto"]
