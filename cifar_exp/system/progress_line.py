"""A line in the terminal that shows how far a download or a conversion is."""

import sys
import time
from types import TracebackType
from typing import Self


class Progress:
    """One line on stderr that counts up, where stderr is a terminal; nothing elsewhere."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done, self._width, self._shown_at = 0, 0, 0.0
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def add(self, count: int) -> None:
        self._done += count
        if self._terminal and time.monotonic() - self._shown_at > 0.2:
            self._shown_at = time.monotonic()
            text = f"{self._what}: {self._done:,} of {self._total:,} {self._unit}"
            self._width = len(text)
            sys.stderr.write(f"\r{text}")
            sys.stderr.flush()

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        if self._shown_at:
            sys.stderr.write(f"\r{'':<{self._width}}\r")  # cleared, in notebooks too, which know no codes for it
