"""Options that Hydra does not have, such as ``--epochs 5``: what to write instead."""

from collections.abc import Collection, Sequence

from cifar_exp.config.defaults import default_settings
from cifar_exp.config.messages import nearest
from cifar_exp.errors import ConfigError


def refuse_unknown_options(words: Sequence[str], known: Collection[str]) -> None:
    """Refuse an option that is none of Hydra's, and name the setting that it may stand for.

    Args:
        words: the words of the command line.
        known: the spellings of Hydra's options.

    Raises:
        ConfigError: there is no such option.
    """
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        is_long = name.startswith("--") and len(name) > 2
        # argparse takes the beginning of a long option, and short options without a space before their value.
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
