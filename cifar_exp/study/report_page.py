"""A study as one HTML file that needs nothing else: the figure, its tables, and what a reader has to know."""

import base64
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from cifar_exp.display.page_assets import STYLE

Section = tuple[str, Sequence[Sequence[str]], Sequence[str]]
"""A title, a table (headings first, then a list of texts a row), and sentences below it."""

STUDY_STYLE = """
section { margin-bottom: 12px; overflow-x: auto; }
section img { display: block; width: 100%; border-radius: 6px; background: #fff; }
.figures { width: auto; min-width: 50%; }
.figures th, .figures td { padding: 6px 0 6px 36px; text-align: right; white-space: pre-line; vertical-align: top; }
.figures td { color: var(--soft); } .figures td::first-line { color: var(--ink); font-weight: 600; }
.figures :first-child { padding-left: 0; text-align: left; } .figures td:first-child::first-line { font-weight: 400; }
li { margin: 5px 0 0 18px; } ul { margin-top: 10px; padding: 0; }
.warning { color: var(--bad); }
"""


def page_html(title: str, figure: Path, sections: Sequence[Section], machines: Sequence[str]) -> str:
    """The whole page. ``figure``: a PNG, which becomes part of it; ``machines``: a line each."""
    image = base64.b64encode(figure.read_bytes()).decode()
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}{STUDY_STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1></header>
<p class="progress-text"><span>{"<br>".join(map(escape, machines))}</span></p>
<section><img src="data:image/png;base64,{image}" alt="{escape(title)}; the figures are in the tables below"></section>
{"".join(map(_section, sections))}
<footer>Drawn {time.strftime("%Y-%m-%d %H:%M:%S")}. Below each figure: its 95 % interval.</footer>
</body>
</html>
"""


def _section(section: Section) -> str:
    title, (headings, *rows), lines = section
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    items = "".join(f"<li{_look(line)}>{escape(line)}</li>" for line in lines)
    below = f"<ul>{items}</ul>" if items else ""
    return f"""<section><h2>{escape(title)}</h2>
<table class="figures"><tr>{head}</tr>{body}</table>
{below}</section>
"""


def _look(line: str) -> str:
    return ' class="warning"' if line.startswith(("warning", "DISTURBED")) else ""
