"""Write a setting so that it can be pasted into a shell."""

import shlex

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf


def argument(name: str, value: object) -> str:
    """``name=value`` for a shell, with the inner quotes that Hydra's grammar needs for this value.

    Args:
        name: the dotted name of a setting.
        value: its value; a string is quoted so that it is read as a string, not as a number or a list.
    """
    if not isinstance(value, str):
        return shlex.quote(f"{name}={value}")
    plain = f"{name}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    # Whether backslashes that stand alone must be doubled depends on what follows them.
    quoted = (f'{name}="{text}"' for text in (escaped, value.replace('"', '\\"')))
    return shlex.quote(next((word for word in (plain, *quoted) if _is_read_as(word, value)), plain))


def _is_read_as(word: str, value: str) -> bool:
    """Whether Hydra and OmegaConf read ``word`` as an override with the text ``value``."""
    try:
        override = OverridesParser.create().parse_override(word)
        if override.is_sweep_override():
            return False
        found = override.value()
        return isinstance(found, str) and OmegaConf.create({"value": found}).value == value
    except (HydraException, ValueError, KeyError):
        return False
    except Exception:  # an interpolation that cannot be resolved here
        return "${" in value
