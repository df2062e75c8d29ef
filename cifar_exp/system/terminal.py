"""Print texts with names that other users chose on the terminal."""

from typing import Any

from rich.console import Console
from rich.text import Text

from cifar_exp.system.printable import printable_text


class Terminal(Console):
    """rich's console for plain texts: control characters are escaped, and ``[...]`` and ``:...:`` are not markup."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Every text passes here, including table cells."""
        return super().render_str(printable_text(text), **settings)
