"""Check a section before anything is called: its `_target_` has the right kind and accepts the settings."""

import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, get_type_hints

from pydantic import PydanticSchemaGenerationError, PydanticUndefinedAnnotation, TypeAdapter, ValidationError

from cifar_exp.config.messages import invalid_value, nearest, shown
from cifar_exp.config.targets import ALLOWED, SCHEDULE_CONTRACT, allowed, matches
from cifar_exp.errors import ConfigError

HYDRA_KEYS = {"_target_", "_args_", "_partial_", "_convert_", "_recursive_"}
# Arguments that the framework passes itself. A configuration must not set them.
PASSED = {"model": {"num_classes"}, "optimizer": {"params"}, "schedule": {"step", "steps_per_epoch", "epochs"}}


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
    "schedule": _takes_steps,
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


def check_kinds(name: str, content: Any, trusted: Sequence[str]) -> None:
    """Import every `_target_` of a section and check its kind: for ``model``, it must be a network.

    An object that is defined in a trusted module may have any kind. An object that such a module imports may not.

    Raises:
        ConfigError: a `_target_` has the wrong kind.
    """
    if isinstance(content, Mapping):
        if path := content.get("_target_"):
            setting = f"{name}._target_={path}"
            target = imported(path, f"{name}._target_")
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
            check_kinds(name, value, trusted)
    elif isinstance(content, list | tuple):
        for value in content:
            check_kinds(name, value, trusted)


def check_settings(name: str, settings: Mapping[str, Any], target: Any) -> None:
    """Check settings against the signature of their `_target_`.

    Raises:
        ConfigError: a setting is unknown, missing or of a wrong type.
    """
    path = settings["_target_"]
    keywords = {key: value for key, value in settings.items() if key not in HYDRA_KEYS}
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


def imported(path: str, setting: str) -> Any:
    """Import the class or function at a dotted path."""
    module, _, attribute = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{setting}={path}: it cannot be imported: {error}") from error


def _check_type(setting: str, value: Any, annotation: Any) -> None:
    """Check a value against an annotation that pydantic supports. The target checks others, such as tensors."""
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
