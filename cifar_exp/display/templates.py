"""HTML pages from Jinja2 templates. ``asset("page.css")`` inserts a file from the folder of this module."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_exp.system.printable import printable_text

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


def rendered(template: Path, **values: Any) -> str:
    """The template with ``values``, which are escaped. A template reads others of its own folder.

    Raises:
        RuntimeError: the installation lacks the template, a style or a script. Jinja2's own error for that, and
            Python's, is an ``OSError``, which callers take for a full disk.
    """
    try:
        return _environment(template.parent).get_template(template.name).render(values)
    except OSError as error:
        raise RuntimeError(f"{template}: the installation lacks a file of it: {error}") from error


@cache
def _environment(folder: Path) -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # imported late: ranks draw no page

    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_printable,
    )
    environment.globals["asset"] = _asset
    return environment


def _printable(value: object) -> object:
    return printable_text(value) if type(value) is str else value  # others are numbers and what is HTML already


@cache
def _asset(name: str) -> "Markup":
    """A style or script of this package, which is not escaped."""
    from markupsafe import Markup

    return Markup(Path(__file__).with_name(name).read_text(encoding="utf-8"))
