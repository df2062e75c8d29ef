"""A progress line in the terminal for a download or a conversion."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress


class Progress:
    """A progress bar on stderr if stderr is a terminal; nothing elsewhere. It disappears at the end."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        console = Console(stderr=True)
        text = TextColumn(f"{{task.completed:,.0f}} of {{task.total:,.0f}} {unit}")
        columns = (TextColumn("{task.description}"), BarColumn(), text)
        self._bar = RichProgress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def add(self, count: int) -> None:
        self._bar.advance(self._task, count)

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        self._bar.stop()
