"""Escape untrusted names (of files, classes, runs) before they are printed.

A control character in such a name could move the cursor, recolour the terminal or add a line to a log.
"""

import re
import sys

# Control characters, lone surrogates (bytes of a name that is no UTF-8), line separators, and marks that reorder text.
_CONTROL = "\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_IN_NAMES = re.compile(f"[\t\n{_CONTROL}]")
_IN_TEXTS = re.compile(f"[{_CONTROL}]")


def printable(name: object) -> str:
    r"""The text of a name on one line: control characters are escaped as in Python, such as ``\x1b`` and ``\n``."""
    return _IN_NAMES.sub(_escaped, str(name))


def printable_text(text: str) -> str:
    """A message or a whole log record: as :func:`printable`, but it keeps its lines and tabs."""
    return _IN_TEXTS.sub(_escaped, text)


def print_notice(message: object) -> None:
    """Print a message of this program on stderr."""
    print(f"cifar-exp: {printable_text(str(message))}", file=sys.stderr, flush=True)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte that is no UTF-8
        code -= 0xDC00
    named = {"\n": r"\n", "\t": r"\t", "\r": r"\r"}.get(found[0])
    return named or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
