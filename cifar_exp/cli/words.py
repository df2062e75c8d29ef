"""The words of a command line: separate settings (`key=value`) from other words, and refuse unusable names."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from cifar_exp.errors import ConfigError
from cifar_exp.system.printable import printable


def settings_in(words: Sequence[str], allowed: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Split ``words`` into settings and the rest.

    Args:
        words: the words of a command line. An existing path counts as the rest, even if it has ``=``.
        allowed: names of settings.

    Returns:
        Values by name, and the rest.

    Raises:
        ConfigError: a setting is not in ``allowed`` or has no value.
    """
    settings: dict[str, str] = {}
    rest: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or Path(word).exists():
            rest.append(word)
        elif name not in allowed or not value:
            raise ConfigError(
                f"{word}: it must be a path that exists, or a setting. Set {' or '.join(f'{a}=...' for a in allowed)}"
            )
        else:
            settings[name] = value
    return settings, rest


def refuse_unusable_names(words: Iterable[object]) -> None:
    """Refuse names that are not UTF-8: configuration, journal and MLflow cannot store them.

    Args:
        words: words that may be or contain a path; the current folder is checked, too.

    Raises:
        ConfigError: one of them is not UTF-8, or the current folder no longer exists.
    """
    try:
        here = Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the current folder was removed. Change to one that exists") from None
    for word in (*words, here):
        try:
            str(word).encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{printable(word)}: the name is not valid UTF-8. Rename it") from None
