"""The command line of a host among several: its own settings, and those that a job of a sweep gets from host 0."""

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser

# Settings of a host itself: how it is reached, what it shows and records, where its images are.
_OWN = re.compile(r"[+~]*(launcher|tracking|progress|hydra|resume|data\.root|devices\.threads)(?=[.=/@]|$)")


def overrides_here(typed: Sequence[str], sent: Sequence[str]) -> list[str]:
    """The overrides of a job on this host.

    Args:
        typed: the overrides of this host's command. In a sweep some are lists of values.
        sent: the overrides of the job on host 0, one value each.

    Returns:
        The typed ones without lists, then those of the job for all other keys.
    """
    plain = plain_overrides(typed)
    keys = {_key(word) for word in plain}
    return [*plain, *(word for word in sent if _key(word) not in keys and not _OWN.match(word))]


def plain_overrides(typed: Sequence[str]) -> list[str]:
    """The overrides that are not lists of values for a sweep."""
    parsed = OverridesParser.create().parse_overrides(list(typed))
    return [word for word, override in zip(typed, parsed, strict=True) if not override.is_sweep_override()]


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")
