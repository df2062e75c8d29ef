"""The study of a search: Optuna's storage, the next trial, and its result. Optuna is imported inside functions."""

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cifar_exp.errors import ConfigError, StorageError
from cifar_exp.sweeps.search_space import Space
from cifar_exp.system.printable import printable
from cifar_exp.system.redaction import masked_text

STORAGE_FILE = "search.db"  # in the sweep's folder
# User attributes of a trial.
FOLDER, REASON, EPOCHS, SECONDS, TEST_ACCURACY, SURPLUS = (
    *("folder", "reason", "epochs", "seconds", "test_accuracy", "surplus"),
)
State = Literal["COMPLETE", "PRUNED", "FAIL"]


@dataclass(frozen=True)
class SearchSettings:
    """The settings of a search. See ``hydra_plugins/cifar_exp_search.py``."""

    n_trials: int
    n_jobs: int
    storage: str | None
    study: str
    sampler: str
    pruner: str
    startup_trials: int
    warmup_epochs: int
    seed: int

    def __post_init__(self) -> None:
        least = {"n_trials": 1, "n_jobs": 1, "startup_trials": 0, "warmup_epochs": 0, "seed": 0}
        for name, number in least.items():
            if (value := getattr(self, name)) < number:
                setting = f"hydra.sweeper.{name}"
                raise ConfigError(f"{setting}={value}: it must be {number} or more. Set {setting}={number}")
        for name, known in (("sampler", ("tpe", "random")), ("pruner", ("median", "none"))):
            if getattr(self, name) not in known:
                value = printable(getattr(self, name))
                raise ConfigError(f"hydra.sweeper.{name}={value}: it must be {' or '.join(known)}. Set one of these")


def check_optuna() -> None:
    """Check that Optuna is installed.

    Raises:
        ConfigError: it is not.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "hydra/sweeper=search: it needs the package optuna, which is not installed. Install it: "
            "pip install 'cifar-exp[search]'"
        ) from error


class SearchStudy:
    """A study in its storage, which other processes may use, too. Its methods may be called from several threads."""

    def __init__(self, settings: SearchSettings, sweep_dir: Path, space: Space, identity: Sequence[str]) -> None:
        """Open the study, or create it.

        Args:
            settings: of the search.
            sweep_dir: its folder; this process has its lock.
            space: what is searched.
            identity: what the trials of a study have in common: a search with others is refused.

        Raises:
            ConfigError: the study in the storage searches something else.
            StorageError: the storage cannot be used.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.settings, self.space, self.folder = settings, space, str(sweep_dir.resolve())
        self._lock = threading.RLock()
        self._address = settings.storage or str(sweep_dir / STORAGE_FILE)
        with self._storage_errors():
            storage = _database(settings.storage or _sqlite(sweep_dir / STORAGE_FILE))
            self._study = optuna.create_study(
                storage=storage,
                study_name=settings.study,
                direction="maximize",
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(settings.seed),
                pruner=self._pruner(),
            )
            self._check_identity({"space": space.description(), "settings": list(identity)})
            running = [trial for trial in self.trials() if trial.state == optuna.trial.TrialState.RUNNING]
            own = [trial for trial in running if not settings.storage or trial.user_attrs.get(FOLDER) == self.folder]
            self._interrupted = [optuna.trial.Trial(self._study, trial._trial_id) for trial in own]

    def trials(self) -> list[Any]:
        """All trials of the study, by number, without those that were one too many."""
        with self._lock, self._storage_errors():
            return [trial for trial in self._study.get_trials(deepcopy=False) if SURPLUS not in trial.user_attrs]

    def next_trial(self) -> tuple[Any, list[str], bool] | None:
        """The next trial with its overrides, and whether it was interrupted before; None after ``n_trials`` trials.

        Interrupted trials of this folder come first. Another process may ask at the same time.
        """
        import optuna

        with self._lock, self._storage_errors():
            if self._interrupted:
                trial = self._interrupted.pop(0)
                self._choose_sampler(trial.number)
                return trial, self.space.overrides(trial), True
            if len(self.trials()) >= self.settings.n_trials:
                return None
            trial = self._study.ask()
            if sum(other.number < trial.number for other in self.trials()) >= self.settings.n_trials:
                trial.set_user_attr(SURPLUS, True)
                self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
                return None
            trial.set_user_attr(FOLDER, self.folder)
            self._choose_sampler(trial.number)
            return trial, self.space.overrides(trial), False

    def report(self, trial: Any, epoch: int, accuracy: float) -> float | None:
        """Note the accuracy after an epoch.

        Returns:
            The median of the completed trials after this epoch if the trial was never as good; else None.
        """
        with self._lock, self._storage_errors():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # an epoch that was reported before the interruption
                trial.report(accuracy, epoch)
            if not trial.should_prune():
                return None
            import numpy as np
            import optuna

            complete = [other for other in self.trials() if other.state == optuna.trial.TrialState.COMPLETE]
            known = [value for other in complete if (value := other.intermediate_values.get(epoch)) is not None]
            return float(np.median(known)) if known else accuracy

    def tell(self, trial: Any, state: State, accuracy: float | None, facts: dict[str, Any]) -> None:
        """Note the result of a trial.

        Args:
            trial: the trial.
            state: how it ended.
            accuracy: its validation accuracy; None if it failed.
            facts: user attributes.
        """
        import optuna

        with self._lock, self._storage_errors():
            for name, value in facts.items():
                trial.set_user_attr(name, value)
            values = accuracy if state == "COMPLETE" else None
            self._study.tell(trial, values, state=optuna.trial.TrialState[state], skip_if_finished=True)

    def importances(self) -> dict[str, float]:
        """The share of each setting in the differences between the trials; empty if there are too few trials."""
        import optuna

        complete = [trial for trial in self.trials() if trial.state == optuna.trial.TrialState.COMPLETE]
        if len(self.space.searched) < 2 or len(complete) < 4:
            return {}
        with self._lock, self._storage_errors(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self.settings.seed)
                found = optuna.importance.get_param_importances(self._study, evaluator=evaluator)
            except (ImportError, RuntimeError, ValueError):  # scikit-learn is missing, or all accuracies are equal
                return {}
            return {str(name): float(share) for name, share in found.items()}

    def _choose_sampler(self, number: int) -> None:
        """Seed the sampler by the number of the trial: a resumed search repeats it, and two processes differ."""
        import optuna

        seed = (self.settings.seed * 1_000_003 + number) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if self.settings.sampler == "random":
                self._study.sampler = optuna.samplers.RandomSampler(seed)
            else:
                startup = self.settings.startup_trials
                # Trials that run at the same time count as bad ones, so that each tries something else.
                self._study.sampler = optuna.samplers.TPESampler(
                    n_startup_trials=startup, seed=seed, constant_liar=True
                )

    def _pruner(self) -> Any:
        import optuna

        if self.settings.pruner == "none":
            return optuna.pruners.NopPruner()
        return optuna.pruners.MedianPruner(
            n_startup_trials=self.settings.startup_trials, n_warmup_steps=self.settings.warmup_epochs + 1
        )

    def _check_identity(self, own: dict[str, Any]) -> None:
        before = self._study.user_attrs.get("identity")
        if before is None:
            self._study.set_user_attr("identity", own)
        elif before != own:
            changed = [
                f"{name}: {before.get(name)} before, {own[name]} now" for name in own if before.get(name) != own[name]
            ]
            raise ConfigError(
                f"hydra.sweeper.study={printable(self.settings.study)}: that study in {masked_text(self._address)} "
                f"searches something else ({printable('; '.join(changed))}). Set hydra.sweeper.study=<another name>"
            )

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """Raise a ``StorageError`` for errors of the storage in the block."""
        import optuna
        import sqlalchemy

        try:
            yield
        except (sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError) as error:
            raise ConfigError(
                f"hydra.sweeper.storage={masked_text(self._address)}: it is not the address of a database. Set "
                f"hydra.sweeper.storage=sqlite:////<path> or postgresql://<host>/<database>"
            ) from error
        except ImportError as error:
            raise ConfigError(
                f"hydra.sweeper.storage={masked_text(self._address)}: this database needs a package that is not "
                f"installed ({error}). Install it, or set another database"
            ) from error
        except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
            setting = "hydra.sweeper.storage" if self.settings.storage else "hydra.sweep.dir"
            cause = masked_text(str(error.__cause__ or error).splitlines()[0])
            raise StorageError(
                f"{setting}={masked_text(self._address)}: the study cannot be read or written there: {cause}. Set "
                f"{setting} to a place that can, and start again; a search that was begun continues with resume=auto"
            ) from error


def _database(address: str) -> Any:
    """Optuna's storage. Of two processes that create its tables at the same moment, one fails and tries again."""
    import optuna
    import sqlalchemy
    from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_fixed

    errors = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.ProgrammingError, sqlalchemy.exc.IntegrityError)
    attempts = retry(
        retry=retry_if_exception_type(errors), stop=stop_after_attempt(3), wait=wait_fixed(0.5), reraise=True
    )
    return attempts(optuna.storages.RDBStorage)(address)


def _sqlite(path: Path) -> str:
    """The address of a SQLite file. The characters ``?`` and ``%`` of a path need escapes."""
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)
