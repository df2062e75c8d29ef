"""Parse the words of a command line: settings (`key=value`) and the rest."""

from collections.abc import Collection, Sequence
from pathlib import Path

from cifar_exp.errors import ConfigError


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
