"""A study as one self-contained HTML file: the figure, its tables, and the notes."""

import base64
import time
from collections.abc import Sequence
from pathlib import Path

from cifar_exp.display.page_assets import STYLE

Section = tuple[str, Sequence[Sequence[str]], Sequence[str]]
"""A title, a table (headings first, then a list of texts a row), and sentences below it."""


def page_html(title: str, figure: Path, sections: Sequence[Section], machines: Sequence[str]) -> str:
    """The page from ``report_page.html``, with all texts escaped.

    Args:
        title: of the page.
        figure: a PNG file, which is embedded.
        sections: the tables with their notes.
        machines: one line for each machine.
    """
    from jinja2 import Environment, FileSystemLoader  # imported late: only reports need it

    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return templates.get_template("report_page.html").render(
        title=title,
        style=STYLE,
        image=base64.b64encode(figure.read_bytes()).decode(),
        sections=sections,
        machines=machines,
        drawn=time.strftime("%Y-%m-%d %H:%M:%S"),
    )
