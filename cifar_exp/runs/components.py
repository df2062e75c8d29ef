"""Turn each section into a functools.partial: import its ``_target_``, check its settings, bind them."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from cifar_exp.config import hydra_versions
from cifar_exp.config.mlflow_settings import with_environment
from cifar_exp.config.reading import SECTIONS
from cifar_exp.config.schema import Config
from cifar_exp.config.targets import RENAMED, allowed, check_targets, with_names
from cifar_exp.errors import ConfigError
from cifar_exp.runs.target_checks import check_kinds, check_settings, imported
from cifar_exp.runs.user_code import OTHER_OPTIMIZER, check_closure, refusing

if TYPE_CHECKING:
    from cifar_exp.data.augment import Augmentation
    from cifar_exp.data.dataset_files import DatasetFiles
    from cifar_exp.launch.elastic import Launcher
    from cifar_exp.models.build import ModelFactory
    from cifar_exp.tracking.tracker import Tracker
    from cifar_exp.training.optimizers import OptimizerFactory
    from cifar_exp.training.schedules import Schedule

# Settings that are not arguments of the `_target_`: the framework uses them itself.
NOT_PASSED = {"data": {"validation"}}


@dataclass(frozen=True)
class Components:
    """The components of a run, with their settings bound.

    Attributes:
        dataset: returns the dataset's files.
        augmentation: transforms a batch of training images.
        make_model: builds the network, given ``num_classes``.
        make_optimizer: builds the optimizer, given ``params`` and ``lr``.
        schedule: (step, steps_per_epoch, epochs) -> factor of the learning rate.
        launcher: starts the ranks.
        tracker: records the run, in MLflow or not at all.
    """

    dataset: "Callable[[], DatasetFiles]"
    augmentation: "Augmentation"
    make_model: "ModelFactory"
    make_optimizer: "OptimizerFactory"
    schedule: "Schedule"
    launcher: "Launcher"
    tracker: "Tracker"


def build(config: Config) -> Components:
    """Import the `_target_` of each section and bind its settings. ``read_config`` has checked the allow-list.

    Raises:
        ConfigError: a `_target_` has the wrong kind, cannot be imported, or does not accept its settings.
    """
    bound = {name: _partial_of_target(name, getattr(config, name), config.trusted_modules) for name in SECTIONS}
    return Components(
        dataset=bound["data"],
        augmentation=bound["augment"](),
        make_model=bound["model"],
        make_optimizer=_checked_optimizer(bound["optimizer"], config.optimizer["_target_"], config.trusted_modules),
        schedule=bound["schedule"],
        launcher=bound["launcher"](),
        tracker=bound["tracking"](),
    )


def build_tracker(composed: DictConfig) -> "Tracker":
    """Build only the tracker, for the parent run of a sweep.

    Args:
        composed: the composed configuration.

    Raises:
        ConfigError: the tracker is not allowed or does not accept its settings.
    """
    section: Any = with_names(OmegaConf.to_container(composed.tracking, resolve=True), RENAMED)
    section = with_environment(section)
    check_targets("tracking", section, composed.trusted_modules)
    tracker: Tracker = _partial_of_target("tracking", section, composed.trusted_modules)()
    return tracker


def model_factory(section: Mapping[str, Any], trusted: Sequence[str]) -> "ModelFactory":
    """Bind the network of a run's configuration. No other section is read: the run may be untrusted.

    Args:
        section: the section ``model``, with current or older names.
        trusted: modules outside the allow-list whose code may run.

    Returns:
        A function that builds the network, given ``num_classes``.

    Raises:
        ConfigError: the network is not allowed or does not accept its settings.
    """
    section = with_names(section, RENAMED)
    check_targets("model", section, trusted)
    factory: ModelFactory = _partial_of_target("model", section, trusted)
    return factory


class _SettingsAcceptedError(BaseException):  # a user's optimizer may catch every Exception
    """Raised when an optimizer iterates over its parameters: it has accepted its settings by then."""


class _Unreadable:
    def __iter__(self) -> Iterator[Any]:
        raise _SettingsAcceptedError


def _checked_optimizer(factory: "partial[Any]", path: str, trusted: Sequence[str]) -> "partial[Any]":
    """Check the optimizer's settings, then remove ``lr``: the plan scales it and passes the value of each step.

    The check builds the optimizer up to the point where it reads its parameters. The rest would import torch's
    compiler, which takes seconds.

    Raises:
        ConfigError: the optimizer rejects its settings.
    """
    check_closure(factory.func, path)
    what = "optimizer: it does not accept these settings together"
    with suppress(_SettingsAcceptedError), refusing(what, trusted, OTHER_OPTIMIZER):
        factory(_Unreadable())
    keywords = {key: value for key, value in factory.keywords.items() if key != "lr"}
    return partial(factory.func, *factory.args, **keywords)


def _partial_of_target(name: str, section: Mapping[str, Any], trusted: Sequence[str]) -> "partial[Any]":
    """Bind a section's settings to its `_target_` with ``hydra.utils.instantiate`` and ``_partial_``.

    Raises:
        ConfigError: a `_target_` has the wrong kind or does not accept its settings.
    """
    if trusted and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # the user's modules are in the current folder
    settings = {key: value for key, value in section.items() if key not in NOT_PASSED.get(name, ())}
    check_kinds(name, settings, trusted)
    check_settings(name, settings, imported(settings["_target_"], f"{name}._target_"))
    try:
        with hydra_versions.limited_to(allowed(name, trusted)):
            bound = instantiate(settings, _partial_=True, _convert_="all")
    except InstantiationException as error:
        raise ConfigError(f"{name}: {error.__cause__ or error}") from error
    plain: partial[Any] = _without_hydra(bound)
    return plain


def _without_hydra(value: Any) -> Any:
    """Replace Hydra's partials by Python's, at any depth: ranks unpickle them and do not import Hydra."""
    if isinstance(value, partial):
        keywords = {key: _without_hydra(argument) for key, argument in value.keywords.items()}
        return partial(value.func, *map(_without_hydra, value.args), **keywords)
    if isinstance(value, dict):
        return {key: _without_hydra(part) for key, part in value.items()}
    return [_without_hydra(part) for part in value] if isinstance(value, list) else value
