"""Style and scripts of the HTML pages, from the files beside this module."""

from pathlib import Path


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


STYLE = _asset("page.css")
HOVER_SCRIPT = _asset("hover.js")
RELOAD_SCRIPT = _asset("reload.js")
