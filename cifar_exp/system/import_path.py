"""Keep files of the current folder from taking the place of modules of Python and of libraries.

A user's folder may have a ``types.py`` or ``socket.py``. Python puts the current folder first on its search path for
``python -m`` and ``python -c``, and multiprocessing starts its helpers (the fork server, the resource tracker, spawned
ranks) with ``python -c``. Ranks get the search path of their parent later, so a user's own modules are still found.

This module is imported before the search path is safe. So it imports nothing that Python has not imported at its start.
"""

import os
import sys


def use_safe_path() -> None:
    """Search the current folder last, in this process; its children do not search it when they start.

    For commands. A user's own program keeps its search path.
    """
    here = [entry for entry in sys.path if _is_current(entry)]
    if here:
        sys.path[:] = [entry for entry in sys.path if not _is_current(entry)] + [os.getcwd()]  # noqa: PTH109
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
    """Environment variables for a Python process that must not search the current folder when it starts."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = os.pathsep.join(entry for entry in entries if not _is_current(entry))  # an empty entry is the current folder
    return {"PYTHONSAFEPATH": "1"} | ({"PYTHONPATH": kept} if kept else {})


def _is_current(entry: str) -> bool:
    try:
        return os.path.samefile(entry or ".", ".")  # noqa: PTH121
    except (OSError, ValueError):
        return False
