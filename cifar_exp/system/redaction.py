"""Remove secrets from all output: passwords in addresses, and values of settings with a secret's name."""

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

from cifar_exp.system.printable import printable_text

MASK = "***"
# The values of these variables are masked in all texts: libraries repeat them in errors.
SECRET_VARIABLES = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
SHORTEST_SECRET = 6  # characters; a shorter value would be found in unrelated words
_NAME = (
    r"(?:token|passw(?:or)?ds?|passphrase|pwd|secrets?|credentials?|(?:api|access|private|secret)[_-]?key"
    r"|auth|authorization|bearer|sig|signature)"
)
_SECRET_NAME = re.compile(rf"(?<![a-z]){_NAME}(?![a-z])", re.IGNORECASE)
_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# A password may contain slashes and @: SQLAlchemy ends it at the last @. Text after a port number is a path.
_USER_INFO = re.compile(r"://(?:[^:/\s]*:(?!\d{1,5}(?:[/?#]|$))\S*|[^/\s]*)@")
_WHOLE_OVERRIDE = re.compile(r"[+~]*([\w.@/-]+)=")
# `token=abc`, `"password": "a b"`, `?api_key=abc&`: in an address, an override, YAML or a message
_ASSIGNED = re.compile(
    rf"((?<![a-z]){_NAME}(?![a-z])[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|(?:Bearer|Basic|Digest|Token)\s+\S+|[^\s,;&)}}\]]+)",
    re.IGNORECASE,
)


def is_secret(name: str) -> bool:
    """Whether a setting's name indicates a secret: ``hf_token``, ``apiKey``; not ``num_tokens``."""
    return bool(_SECRET_NAME.search(_CAMEL_CASE.sub("_", name)))


def masked_text(text: str) -> str:
    """A text without user names and passwords in addresses, and with ``***`` for the values of secrets.

    An override whose key names a secret, as in ``+data.token=a b``, loses its whole value.
    """
    for name in SECRET_VARIABLES:
        if len(secret := os.environ.get(name, "").strip()) >= SHORTEST_SECRET:
            text = text.replace(secret, MASK)
    override = _WHOLE_OVERRIDE.match(text)
    if override and is_secret(override[1].rpartition(".")[2]):
        return f"{override[0]}{MASK}"
    return _ASSIGNED.sub(rf"\1{MASK}", _USER_INFO.sub("://", text))


def masked(value: Any, name: str = "") -> Any:
    """Nested settings with :func:`masked_text` applied; tuples become lists, as in JSON.

    Args:
        value: a setting, or a mapping or list of settings.
        name: its name; the value of a secret becomes ``***``, except true, false and None.
    """
    if is_secret(name) and not isinstance(value, bool | None):
        return MASK
    if isinstance(value, Mapping):
        return {key: masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item) for item in value]
    return masked_text(value) if isinstance(value, str) else value


class MaskingFormatter(logging.Formatter):
    """Formats log records with :func:`masked_text` and without control characters, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_text(masked_text(super().format(record)))
