"""A study as one self-contained HTML file: the figure, its tables, and the notes."""

import base64
import time
from collections.abc import Sequence
from pathlib import Path

from cifar_exp.display.templates import rendered

Section = tuple[str, Sequence[Sequence[str]], Sequence[str]]
"""A title, a table (headings first, then a list of texts a row), and sentences below it."""


def report_html(title: str, figure: Path, sections: Sequence[Section], machines: Sequence[str]) -> str:
    """The page from ``report_page.html``, with all texts escaped.

    Args:
        title: of the page.
        figure: a PNG file, which is embedded.
        sections: the tables with their notes.
        machines: one line for each machine.
    """
    return rendered(
        Path(__file__).with_name("report_page.html"),
        title=title,
        image=base64.b64encode(figure.read_bytes()).decode(),
        sections=sections,
        machines=machines,
        drawn=time.strftime("%Y-%m-%d %H:%M:%S"),
    )
