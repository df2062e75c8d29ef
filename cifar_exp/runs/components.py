"""Turn each section into a functools.partial: import its ``_target_``, check its settings, bind them."""

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pydantic import PydanticSchemaGenerationError, PydanticUndefinedAnnotation, TypeAdapter, ValidationError

from cifar_exp.config import hydra_versions
from cifar_exp.config.messages import invalid_value, nearest, shown
from cifar_exp.config.reading import SECTIONS
from cifar_exp.config.schema import Config
from cifar_exp.config.targets import ALLOWED, RENAMED, SCHEDULE_CONTRACT, allowed, check_targets, matches, with_names
from cifar_exp.errors import ConfigError
from cifar_exp.runs.user_code import OTHER_OPTIMIZER, check_closure, refusing

if TYPE_CHECKING:
    from cifar_exp.data.augment import Augmentation
    from cifar_exp.data.dataset_files import DatasetFiles
    from cifar_exp.launch.elastic import Launcher
    from cifar_exp.models.build import ModelFactory
    from cifar_exp.tracking.tracker import Tracker
    from cifar_exp.training.optimizers import OptimizerFactory
    from cifar_exp.training.schedules import Schedule

OF_HYDRA = {"_target_", "_args_", "_partial_", "_convert_", "_recursive_"}
# Settings that are not arguments of the `_target_`: the framework uses them itself.
NOT_PASSED = {"data": {"validation"}}
# Arguments that the framework passes itself. A configuration must not set them.
PASSED = {"model": {"num_classes"}, "optimizer": {"params"}, "schedule": {"step", "steps_per_epoch", "epochs"}}


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
    """Import the `_target_` of each section and bind its settings. ``read_config`` has checked that they are allowed.

    Raises:
        ConfigError: a `_target_` is of another kind, cannot be imported, or does not accept its settings.
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
    check_targets("tracking", section, composed.trusted_modules)
    tracker: Tracker = _partial_of_target("tracking", section, composed.trusted_modules)()
    return tracker


def model_factory(section: Mapping[str, Any], trusted: Sequence[str]) -> "ModelFactory":
    """Bind the network of a run's configuration. No other section is read: the run may be untrusted.

    Args:
        section: the section ``model``, with today's or older names.
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


class _SettingsAcceptedError(BaseException):  # a user's optimizer may catch each Exception
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
    _check_kinds(name, settings, trusted)
    _check_settings(name, settings, _imported(settings["_target_"], f"{name}._target_"))
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


def _check_kinds(name: str, content: Any, trusted: Sequence[str]) -> None:
    """Import every `_target_` of a section and check its kind, such as a network for ``model``.

    An object that is defined in a trusted module may be of any kind. An object that such a module only imports may not.

    Raises:
        ConfigError: a `_target_` has the wrong kind.
    """
    if isinstance(content, Mapping):
        if path := content.get("_target_"):
            setting = f"{name}._target_={path}"
            target = _imported(path, f"{name}._target_")
            home = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
            own = matches(home, allowed(name, trusted)[len(ALLOWED[name]) :])
            if name == "schedule" and not (callable(target) and KINDS[name](target)):
                raise ConfigError(f"{setting}: {SCHEDULE_CONTRACT}")
            if not callable(target) or not (own or (matches(home, ALLOWED[name]) and KINDS[name](target))):
                raise ConfigError(
                    f"{setting}: it names no {NOUNS[name]} from {', '.join(ALLOWED[name])}. Set {name}=<choice of the "
                    f"group>, or {name}._target_ to such an object"
                )
        for value in content.values():
            _check_kinds(name, value, trusted)
    elif isinstance(content, list | tuple):
        for value in content:
            _check_kinds(name, value, trusted)


def _returns(target: Any, kind: str) -> bool:
    """Whether a class has a base class named ``kind``, or a function's return annotation is such a class."""
    if inspect.isclass(target):
        return any(base.__name__ == kind for base in target.__mro__)
    with suppress(NameError, TypeError):
        returned = get_type_hints(target).get("return")
        return inspect.isclass(returned) and any(base.__name__ == kind for base in returned.__mro__)
    return False


def _takes_steps(target: Any) -> bool:
    """Whether a function can be called with the names of a schedule's three arguments."""
    if inspect.isclass(target):
        return False
    with suppress(TypeError, ValueError):  # such as a built-in function
        parameters = inspect.signature(target).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return True
        named = {name for name, parameter in parameters.items() if parameter.kind is not parameter.POSITIONAL_ONLY}
        return PASSED["schedule"] <= named
    return False


# Classes are compared by name: importing them takes seconds, and a wrong setting is reported sooner.
KINDS: dict[str, Callable[[Any], bool]] = {
    "data": lambda target: _returns(target, "DatasetFiles"),
    "augment": inspect.isclass,
    "model": lambda target: _returns(target, "Module"),
    "optimizer": lambda target: _returns(target, "Optimizer"),
    "schedule": lambda target: _takes_steps(target),
    "launcher": lambda target: inspect.isclass(target) and hasattr(target, "launch"),
    "tracking": lambda target: inspect.isclass(target) and hasattr(target, "sink"),
}
NOUNS = {
    "data": "dataset",
    "augment": "augmentation",
    "model": "network",
    "optimizer": "optimizer",
    "schedule": "schedule",
    "launcher": "launcher",
    "tracking": "tracker",
}


def _check_settings(name: str, settings: Mapping[str, Any], target: Any) -> None:
    """Check settings against the signature of their `_target_`.

    Raises:
        ConfigError: a setting is unknown, missing or of a wrong type.
    """
    path = settings["_target_"]
    keywords = {key: value for key, value in settings.items() if key not in OF_HYDRA}
    try:
        signature = inspect.signature(target, eval_str=True)
    except (TypeError, ValueError) as error:  # such as a built-in class
        raise ConfigError(
            f"{name}._target_={path}: it has no signature to check. Set it to a function or class that has one"
        ) from error
    given = list(signature.parameters)[: len(settings.get("_args_", ()))]  # by position
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    passed = PASSED.get(name, set())
    if name == "optimizer":
        passed = passed | set(list(signature.parameters)[:1])  # passed by position: its name is free
    valid = set(signature.parameters) - passed
    for key, value in keywords.items():
        if key in passed or (key not in signature.parameters and not takes_any):
            raise ConfigError(
                f"{name}.{key}={shown(value)}: {path} has no such setting. "
                f"{nearest(f'{name}.{key}', [f'{name}.{word}' for word in valid])}"
            )
        if key in signature.parameters and not isinstance(value, Mapping):
            _check_type(f"{name}.{key}", value, signature.parameters[key].annotation)
    for key, parameter in signature.parameters.items():
        variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        required = parameter.default is parameter.empty and not variable
        if required and key not in keywords and key not in passed and key not in given:
            raise ConfigError(f"{name}.{key}: {path} needs it. Set +{name}.{key}=<value>")


def _imported(path: str, setting: str) -> Any:
    """Import the class or function at a dotted path."""
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{setting}={path}: it cannot be imported: {error}") from error


def _check_type(setting: str, value: Any, annotation: Any) -> None:
    """Check a value against an annotation that pydantic supports. Others, such as tensors, are left to the target."""
    if annotation is inspect.Parameter.empty:
        return
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation):
        return
    try:
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise ConfigError(invalid_value(setting, value, error.errors(include_url=False))) from error
