"""The options of a command line, such as ``--cfg job``, and suggestions for unknown ones."""

import argparse
from collections.abc import Collection, Mapping, Sequence

from cifar_exp.config.defaults import default_settings
from cifar_exp.config.messages import nearest
from cifar_exp.errors import ConfigError


def split_options(words: Sequence[str], known: Mapping[str, argparse.Action]) -> tuple[list[str], list[str]]:
    """Split ``words`` into options with their values, and the other words.

    Args:
        words: the words of a command line.
        known: options: spelling -> argparse action. The value of an option is the next word.
    """
    options, others, rest = list[str](), list[str](), list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            others.append(word)
            continue
        options.append(word)
        action = known.get(word)
        if action is None or not rest:
            continue
        if action.nargs is None or (action.nargs == "?" and rest[0] in (action.choices or ())):
            options.append(rest.pop(0))
    return options, others


def refuse_unknown_options(words: Sequence[str], known: Collection[str]) -> None:
    """Refuse an option that is not one of Hydra's, and suggest the setting that may be meant.

    Args:
        words: the words of the command line.
        known: the spellings of Hydra's options.

    Raises:
        ConfigError: there is no such option.
    """
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        is_long = name.startswith("--") and len(name) > 2
        # argparse accepts abbreviated long options, and short options without a space before their value.
        if not is_long or any(option.startswith(name) for option in known):
            continue
        following = words[place + 1] if place + 1 < len(words) else ""
        if not equals and following and "=" not in following and not following.startswith("-"):
            value = following
        raise ConfigError(_refusal(word, name, value, known))


def _refusal(word: str, name: str, value: str, known: Collection[str]) -> str:
    key = name.lstrip("-").replace("-", "_")
    settings = [setting for setting in default_settings() if key in (setting, setting.rpartition(".")[2])]
    if settings:
        written = " or ".join(f"{setting}={value or '<value>'}" for setting in settings)
        return f"{word}: a setting is written without dashes, as key=value. Set {written}"
    near = nearest(name, [option for option in known if option.startswith("--")])
    return f"{word}: there is no such option. {near if 'mean' in near else 'Write settings as key=value; see --help'}"
