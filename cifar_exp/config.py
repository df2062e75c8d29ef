"""Composed YAML -> the typed configuration and the parts it names. The only place that instantiates anything."""

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import PydanticSchemaGenerationError, PydanticUndefinedAnnotation, TypeAdapter, ValidationError

from cifar_exp.errors import ConfigError
from cifar_exp.schema import COMMON, KEPT, Config

if TYPE_CHECKING:  # these import torch, which a wrong setting should not have to wait for
    from cifar_exp.array_cache import DatasetFiles
    from cifar_exp.augment import Augmentation
    from cifar_exp.launch import Launcher
    from cifar_exp.models import ModelFactory
    from cifar_exp.optim import OptimizerFactory, Schedule
    from cifar_exp.tracking import Tracker

TRUSTED = ("cifar_exp", "torch", "torchvision")
SECTIONS = ("data", "augment", "model", "optimizer", "schedule", "launcher", "tracking")
# Arguments that the framework passes itself, so that a configuration neither needs nor may set them.
PASSED = {"model": {"num_classes"}, "optimizer": {"params"}, "schedule": {"step", "steps_per_epoch", "epochs"}}


def conf_dir() -> Path:
    """Where the config groups lie: in the package when it was installed from a wheel, beside it in a clone."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def register_resolvers() -> None:
    """``${cores:N}`` in YAML: N, or the number of cores this process may use if that is less."""
    OmegaConf.register_new_resolver("cores", lambda wanted: min(wanted, len(os.sched_getaffinity(0))), replace=True)


def read_config(composed: DictConfig) -> Config:
    """The typed configuration, every setting of the package checked.

    Raises:
        ConfigError: naming the first setting that is unknown, of a wrong type, out of range or not trusted.
    """
    try:
        plain: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'configuration'}: {error}") from error
    config: Config = _validated(Config, plain, "")
    for name in SECTIONS:
        section = plain[name]
        if not isinstance(section.get("_target_"), str):
            choices = ", ".join(sorted(path.stem for path in (conf_dir() / name).glob("*.yaml")))
            raise ConfigError(
                f"{name}: it has no _target_, so no choice of the group is loaded. Type {name}=<{choices}>"
            )
        if name in COMMON:
            known = {field.name for field in fields(COMMON[name])}
            _validated(COMMON[name], {key: value for key, value in section.items() if key in known}, f"{name}.")
    _check_targets(plain, "", (*TRUSTED, *config.trusted_modules))
    return config


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names: ``{"model": {"width": 32}}`` -> ``{"model.width": 32}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nearest(name: str, valid: Iterable[str]) -> str:
    """`` Did you mean X?`` where something valid is close to ``name``, else the list of what is valid."""
    names = sorted(valid)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]}?"
    return f"Valid: {', '.join(names)}" if len(names) <= 12 else "cifar-exp --help lists them all"


def default_settings() -> dict[str, Any]:
    """Every setting that some YAML file of the package sets, by dotted name, with the value it has there."""
    settings: dict[str, Any] = {}
    primary: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "config.yaml"))
    defaults = [item for entry in primary["defaults"] if entry != "_self_" for item in entry.items()]
    # The default choice of each group first: its values are what a user expects to be told.
    paths = [conf_dir() / group / f"{choice}.yaml" for group, choice in defaults]
    for path in [*filter(Path.exists, paths), *sorted(conf_dir().rglob("*.yaml"))]:
        group = path.relative_to(conf_dir()).parts[0]
        if group in ("experiment", "hydra"):
            continue
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        prefix = "" if group == "config.yaml" else f"{group}."
        settings = {f"{prefix}{name}": value for name, value in flattened(content).items()} | settings
    hidden = ("hydra.", "defaults")
    return {name: value for name, value in settings.items() if not name.startswith(hidden) and "_target_" not in name}


def _validated(schema: type, content: Mapping[str, Any], prefix: str) -> Any:
    """``content`` as an instance of ``schema``. JSON mode is strict about types and still takes mappings."""
    try:
        return TypeAdapter(schema).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise ConfigError(_explain(error, prefix)) from error


def _explain(error: ValidationError, prefix: str) -> str:
    """The first problem as one sentence: setting, value, rule, what to type."""
    problems = error.errors(include_url=False)
    # A section and its key; what follows in pydantic's location is the member of a union (`4` or `auto`) it tried.
    location = problems[0]["loc"][:2]
    problems = [problem for problem in problems if problem["loc"][:2] == location]
    setting, value = prefix + ".".join(map(str, location)), problems[0]["input"]
    if problems[0]["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return unknown_setting(setting)
    if problems[0]["type"] == "missing":
        return f"{setting}: it must be given. Type {setting}=<value>"
    return _refused(setting, value, problems)


def _refused(setting: str, value: Any, problems: Sequence[Mapping[str, Any]]) -> str:
    """Setting, value, rule, and the nearest valid value, or the default where none is near."""
    rule = " or ".join(dict.fromkeys(_rule(problem) for problem in problems))
    examples = [valid for problem in problems if (valid := _valid(problem)) is not None]
    example = examples[0] if examples else default_settings().get(setting, "<value>")
    return f"{setting}={shown(value)}: it must be {rule}. Type {setting}={shown(example)}"


def unknown_setting(setting: str) -> str:
    """The message for a setting that does not exist."""
    if setting in default_settings():  # of another choice of the group
        group = setting.partition(".")[0]
        return (
            f"{setting}: the chosen {group} has no such setting. cifar-exp {group}=<choice> --cfg job shows what it has"
        )
    groups = [path.name for path in conf_dir().iterdir() if path.is_dir()]
    valid = default_settings() if "." in setting else [*groups, *default_settings()]
    return f"{setting}: there is no such setting. {nearest(setting, valid)}"


def shown(value: Any) -> str:
    """A value as it is typed on the command line."""
    return json.dumps(value) if isinstance(value, bool | None) else str(value)


def _rule(problem: Mapping[str, Any]) -> str:
    limits = problem.get("ctx", {})
    return {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "a word",
        "string_too_short": "a word that is not empty",
        "literal_error": str(limits.get("expected", "")).replace("'", ""),
        "greater_than_equal": f"{limits.get('ge')} or more",
        "greater_than": f"more than {limits.get('gt')}",
        "less_than_equal": f"{limits.get('le')} or less",
        "less_than": "finite" if limits.get("lt") == float("inf") else f"less than {limits.get('lt')}",
        "dict_type": "a choice of the group",
        "dataclass_type": "a mapping of settings",
        "tuple_type": "a list",
    }.get(problem["type"], str(problem["msg"]))


def _valid(problem: Mapping[str, Any]) -> Any:
    """A value near the refused one that would do, or None where only a default can be offered."""
    limits = problem.get("ctx", {})
    if problem["type"] == "literal_error":
        words = str(limits["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        return (get_close_matches(str(problem["input"]), words, n=1) or words)[0]
    return limits.get("ge", limits.get("le"))


def _check_targets(content: Any, setting: str, trusted: Iterable[str]) -> None:
    """Refuse every `_target_`, however deep, that lies outside the trusted packages, before it is imported."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            name = f"{setting}.{key}" if setting else str(key)
            if key == "_target_" and not _is_trusted(str(value), trusted):
                package = str(value).split(".")[0]
                raise ConfigError(
                    f"{name}={value}: only code of {', '.join(trusted)} is run. If you trust it, type "
                    f"'trusted_modules=[{package}]'"
                )
            _check_targets(value, name, trusted)
    elif isinstance(content, list):
        for index, value in enumerate(content):
            _check_targets(value, f"{setting}.{index}", trusted)


def _is_trusted(path: str, trusted: Iterable[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in trusted)


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
