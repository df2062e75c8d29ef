"""Messages about unknown settings and invalid values."""

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from cifar_exp.config.arguments import argument
from cifar_exp.config.defaults import conf_dir, default_settings
from cifar_exp.system.printable import printable


def nearest(name: str, valid: Iterable[str]) -> str:
    """``Did you mean X?`` if a valid name is close to ``name``, else the valid names or how to list them."""
    names = sorted(valid)
    # The section does not count: all settings of a section have the same beginning.
    close = [found for found in get_close_matches(name, names, n=3, cutoff=0.6) if _is_close(_key(name), _key(found))]
    if close:
        return f"Did you mean {close[0]}?"
    return f"Valid: {', '.join(names)}" if len(names) <= 12 else "cifar-exp --help lists them all"


def _is_close(name: str, other: str) -> bool:
    return bool(get_close_matches(name, [other], n=1, cutoff=0.6))


def _key(setting: str) -> str:
    return setting.rpartition(".")[2]


def invalid_setting(error: ValidationError, prefix: str) -> str:
    """The message for pydantic's first problem: setting, value, rule, remedy."""
    problems = error.errors(include_url=False)
    # pydantic's location is the section, the key, then the member of a union (`4` or `auto`) that it tried.
    location = problems[0]["loc"][:2]
    problems = [problem for problem in problems if problem["loc"][:2] == location]
    setting, value = prefix + ".".join(map(str, location)), problems[0]["input"]
    if problems[0]["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return _without_package(setting, value) or unknown_setting(setting)
    if problems[0]["type"] == "missing":
        return f"{setting}: it is required. Set {setting}={shown(default_settings().get(setting, '<value>'))}"
    return invalid_value(setting, value, problems)


def _without_package(group: str, content: Any) -> str | None:
    """The message about a preset whose settings ended up in its group; None if it is not a preset."""
    tops = {name.partition(".")[0] for name in default_settings()}
    own = [str(key) for key in content if str(key) in tops] if isinstance(content, Mapping) else []
    if not own and not (conf_dir() / group).is_dir():
        return None
    wrong = f"its file sets {group}.{own[0]} instead of {own[0]}" if own else "its file is not a preset"
    return (
        f"{group}: {wrong}. A preset is a mapping of settings that begins with the line '# @package _global_'. Add it "
        f"as the first line of {group}/<choice>.yaml"
    )


def invalid_value(setting: str, value: Any, problems: Sequence[Mapping[str, Any]]) -> str:
    """The message for an invalid value: setting, value, rule, and the nearest valid value or the default."""
    rule = " or ".join(dict.fromkeys(_rule(problem) for problem in problems))
    examples = [valid for problem in problems if (valid := _valid(problem)) is not None]
    if problems[0]["type"] == "string_type" and isinstance(value, bool | int | float):
        return f"{setting}={shown(value)}: it must be {rule}. In a shell, write {argument(setting, shown(value))}"
    example = examples[0] if examples else default_settings().get(setting, "<value>")
    return f"{setting}={shown(value)}: it must be {rule}. Set {setting}={shown(example)}"


def unknown_setting(setting: str) -> str:
    """The message for a setting that does not exist."""
    if setting in default_settings():  # another choice of the group has this setting
        group = setting.partition(".")[0]
        return f"{setting}: the chosen {group} has no such setting. See cifar-exp {group}=<choice> --cfg job"
    groups = [path.name for path in conf_dir().iterdir() if path.is_dir()]
    of_another_section = [name for name in default_settings() if _key(name) == _key(setting)]
    if "." in setting and len(of_another_section) == 1:
        return f"{setting}: there is no such setting. Did you mean {of_another_section[0]}?"
    valid = default_settings() if "." in setting else [*groups, *default_settings()]
    return f"{setting}: there is no such setting. {nearest(setting, valid)}"


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    return json.dumps(value) if isinstance(value, bool | None) else printable(value)


def shortened(text: str) -> str:
    """At most 200 characters of a text."""
    return text if len(text) <= 200 else f"{text[:197]}..."


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
    }.get(problem["type"], shortened(str(problem["msg"])))


def _valid(problem: Mapping[str, Any]) -> Any:
    """A valid value near the refused one; None if there is none."""
    limits = problem.get("ctx", {})
    if problem["type"] == "literal_error":
        words = str(limits["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        return (get_close_matches(str(problem["input"]), words, n=1) or words)[0]
    return limits.get("ge", limits.get("le"))
