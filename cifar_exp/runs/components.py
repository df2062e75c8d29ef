"""Build what the config names: `_target_`s on the allow-list, checked before anything starts."""

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from pydantic import PydanticSchemaGenerationError, PydanticUndefinedAnnotation, TypeAdapter, ValidationError

from cifar_exp.config import hydra_versions
from cifar_exp.config.messages import _refused, nearest, shown
from cifar_exp.config.reading import SECTIONS, TRUSTED, _check_targets, _is_trusted
from cifar_exp.config.schema import KEPT, Config
from cifar_exp.errors import ConfigError

if TYPE_CHECKING:
    from cifar_exp.data.augment import Augmentation
    from cifar_exp.data.dataset_files import DatasetFiles
    from cifar_exp.launch.elastic import Launcher
    from cifar_exp.models.networks import ModelFactory
    from cifar_exp.tracking.tracker import Tracker
    from cifar_exp.training.optimizers import OptimizerFactory
    from cifar_exp.training.schedules import Schedule

# Arguments that the framework passes itself, so that a configuration neither needs nor may set them.
PASSED = {"model": {"num_classes"}, "optimizer": {"params"}, "schedule": {"step", "steps_per_epoch", "epochs"}}


@dataclass(frozen=True)
class Parts:
    """The components that a configuration names, with their settings bound."""

    dataset: "Callable[[], DatasetFiles]"
    augmentation: "Augmentation"
    make_model: "ModelFactory"
    make_optimizer: "OptimizerFactory"
    schedule: "Schedule"
    launcher: "Launcher"
    tracker: "Tracker"


def build(config: Config) -> Parts:
    """Import and bind what the `_target_`s name.

    Raises:
        ConfigError: where one cannot be imported, or does not take the settings it is given.
    """
    trusted = (*TRUSTED, *config.trusted_modules)
    if config.trusted_modules and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # the user's modules lie where the command is typed
    with hydra_versions.limited_to(trusted):
        bound = {name: _bind(name, getattr(config, name), trusted) for name in SECTIONS}
    return Parts(
        dataset=bound["data"],
        augmentation=bound["augment"](),
        make_model=bound["model"],
        make_optimizer=_checked_optimizer(bound["optimizer"]),
        schedule=bound["schedule"],
        launcher=bound["launcher"](),
        tracker=bound["tracking"](),
    )


def build_tracker(composed: DictConfig) -> "Tracker":
    """The tracker alone, for what records more than one run."""
    section: Any = OmegaConf.to_container(composed.tracking, resolve=True)
    trusted = (*TRUSTED, *composed.trusted_modules)
    _check_targets({"tracking": section}, "", trusted)
    tracker: Tracker = _bind("tracking", section, trusted)()
    return tracker


class _SettingsAcceptedError(Exception):
    """An optimizer that asks for its parameters has accepted its settings."""


class _Unreadable:
    def __iter__(self) -> Iterator[Any]:
        raise _SettingsAcceptedError


def _checked_optimizer(factory: "partial[Any]") -> "partial[Any]":
    """The optimizer without its configured rate: the plan scales that and passes each step's.

    Raises:
        ConfigError: where its settings do not go together. It is built up to the point where it reads its parameters,
            since the rest imports torch's compiler, which takes seconds.
    """
    try:
        factory(_Unreadable())
    except _SettingsAcceptedError:
        pass
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: its settings do not go together: {error}") from error
    keywords = {key: value for key, value in factory.keywords.items() if key != "lr"}
    return partial(factory.func, *factory.args, **keywords)


def _bind(name: str, section: Mapping[str, Any], trusted: Iterable[str]) -> "partial[Any]":
    """The section's `_target_` with its keywords, checked against its signature."""
    target = _imported(section["_target_"], f"{name}._target_", trusted)
    keywords = {key: value for key, value in section.items() if key not in {"_target_", *KEPT.get(name, ())}}
    try:
        signature = inspect.signature(target, eval_str=True)
    except (TypeError, ValueError) as error:  # as that of a built-in class
        raise ConfigError(
            f"{name}._target_={section['_target_']}: it does not say what it is called with. Type that of a function "
            f"or class which does"
        ) from error
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    passed = PASSED.get(name, set())
    valid = set(signature.parameters) - passed
    for key, value in keywords.items():
        if key in passed or (key not in signature.parameters and not takes_any):
            raise ConfigError(
                f"{name}.{key}={shown(value)}: {section['_target_']} has no such setting. "
                f"{nearest(f'{name}.{key}', [f'{name}.{word}' for word in valid])}"
            )
        if key in signature.parameters:
            _check_type(f"{name}.{key}", value, signature.parameters[key].annotation)
    for key, parameter in signature.parameters.items():
        variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        required = parameter.default is parameter.empty and not variable
        if required and key not in keywords and key not in passed:
            raise ConfigError(f"{name}.{key}: {section['_target_']} needs it. Type +{name}.{key}=<value>")
    return partial(target, **keywords)


def _imported(path: str, setting: str, trusted: Iterable[str]) -> Any:
    """The class or function at a dotted path; a re-export of something that is not trusted is refused too."""
    module, _, attribute = path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{setting}={path}: it cannot be imported: {error}") from error
    home = str(getattr(target, "__module__", module))
    if not callable(target) or not _is_trusted(home, trusted):
        raise ConfigError(f"{setting}={path}: it is no class or function of {', '.join(trusted)}")
    return target


def _check_type(setting: str, value: Any, annotation: Any) -> None:
    """Check a value against an annotation that pydantic knows; tensors and the like are left to the target."""
    if annotation is inspect.Parameter.empty:
        return
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation):
        return
    try:
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise ConfigError(_refused(setting, value, error.errors(include_url=False))) from error
