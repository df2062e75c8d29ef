"""Keep files in the current folder from shadowing modules of Python and of libraries.

A user's folder may have a ``types.py`` or ``socket.py``. Python puts the current folder first on its search path for
``python -m`` and ``python -c``, and multiprocessing starts its helpers (the fork server, the resource tracker, spawned
ranks) with ``python -c``. Ranks get the search path of their parent later, so a user's own modules are still found.

This module is imported before the search path is safe. So it imports nothing that Python has not imported at its start.
"""

import os
import sys


def use_safe_path() -> None:
    """Search the current folder last, in this process; its children do not search it when they start.

    For commands. A user's own program keeps its search path. If this package is not installed, the current folder
    stays before the installed packages, one of which may be another copy.
    """
    others = [entry for entry in sys.path if not _is_current(entry)]
    if len(others) < len(sys.path):
        libraries = [place for place, entry in enumerate(others) if _is_library_path(entry)]
        place = len(others) if _IS_INSTALLED or not libraries else libraries[0]
        sys.path[:] = [*others[:place], os.getcwd(), *others[place:]]  # noqa: PTH109
    SafeHelpers().__enter__()


class SafeHelpers:
    """Python processes that are started inside this context do not search the current folder when they start."""

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in ("PYTHONSAFEPATH", "PYTHONPATH")}
        self._set(safe_variables())

    def __exit__(self, *error: object) -> None:
        self._set({name: value for name, value in self._before.items() if value is not None})

    def _set(self, variables: "dict[str, str]") -> None:
        for name in self._before:
            os.environ.pop(name, None)
        os.environ.update(variables)


def safe_variables() -> "dict[str, str]":
    """Environment variables for a Python process that must not search the current folder when it starts.

    If this package is not installed, its folder stays in PYTHONPATH, even if that is the current folder.
    """
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = [entry for entry in entries if not _is_current(entry)]  # an empty entry is the current folder
    path = os.pathsep.join(kept if _IS_INSTALLED else [_ROOT, *kept])
    return {"PYTHONSAFEPATH": "1"} | ({"PYTHONPATH": path} if path else {})


def _is_current(entry: str) -> bool:
    try:
        return os.path.samefile(entry or ".", ".")  # noqa: PTH121
    except (OSError, ValueError):
        return False


def _is_library_path(entry: str) -> bool:
    return os.path.basename(entry) in ("site-packages", "dist-packages")  # noqa: PTH119


def _is_installed() -> bool:
    """Whether other Python processes find this copy of the package, wherever they are started."""
    if not _is_current(_ROOT):
        return True
    behind = [place for place, entry in enumerate(sys.path) if _is_library_path(entry)]
    return bool(behind) and any(map(_is_current, sys.path[behind[0] :]))  # of an editable installation


_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120
_IS_INSTALLED = _is_installed()  # before use_safe_path changes the search path
