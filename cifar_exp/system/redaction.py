"""Secrets stay out of what is written and shown: passwords in addresses, and settings that are named like secrets."""

import logging
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
_NAME = (
    r"(?:token|passw(?:or)?ds?|passphrase|pwd|secrets?|credentials?|(?:api|access|private|secret)[_-]?key"
    r"|auth|authorization|bearer|sig|signature)"
)
_SECRET_NAME = re.compile(rf"(?<![a-z]){_NAME}(?![a-z])", re.IGNORECASE)
_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# A password may hold slashes and @: SQLAlchemy takes all up to the last @ for it. What begins with a port is a path.
_USER_INFO = re.compile(r"://(?:[^:/\s]*:(?!\d{1,5}(?:[/?#]|$))\S*|[^/\s]*)@")
_WHOLE_OVERRIDE = re.compile(r"[+~]*([\w.@/-]+)=")
# `token=abc`, `"password": "a b"`, `?api_key=abc&`: in an address, an override, YAML or a message
_ASSIGNED = re.compile(
    rf"((?<![a-z]){_NAME}(?![a-z])[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|(?:Bearer|Basic|Digest|Token)\s+\S+|[^\s,;&)}}\]]+)",
    re.IGNORECASE,
)


def is_secret(name: str) -> bool:
    """Whether a setting's name says that its value is a secret: ``hf_token``, ``apiKey``; not ``num_tokens``."""
    return bool(_SECRET_NAME.search(_CAMEL_CASE.sub("_", name)))


def masked_text(text: str) -> str:
    """A text without the user's name and password in its addresses, and with ``***`` for what is named a secret.

    An override whose key names a secret, as in ``+data.token=a b``, loses its whole value.
    """
    override = _WHOLE_OVERRIDE.match(text)
    if override and is_secret(override[1].rpartition(".")[2]):
        return f"{override[0]}{MASK}"
    return _ASSIGNED.sub(rf"\1{MASK}", _USER_INFO.sub("://", text))


def masked(value: Any, name: str = "") -> Any:
    """Settings however deep, as :func:`masked_text` would have them; tuples become the lists that JSON makes of them.

    Args:
        value: a setting or a mapping or list of settings.
        name: what it is called; the value of a secret is ``***``, but for true, false and None.
    """
    if is_secret(name) and not isinstance(value, bool | None):
        return MASK
    if isinstance(value, Mapping):
        return {key: masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item) for item in value]
    return masked_text(value) if isinstance(value, str) else value


class MaskingFormatter(logging.Formatter):
    """For log files: each line as :func:`masked_text` would have it, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return masked_text(super().format(record))
