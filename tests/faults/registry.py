"""The list of cases: their faults, how often each is tried, and what a case needs."""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_exp.config.defaults import default_settings

if TYPE_CHECKING:
    from tests.faults.scene import Scene

Function = Callable[["Scene"], None]


@dataclass(frozen=True)
class Case:
    """A function that injects faults and checks the outcome.

    Attributes:
        function: takes a new scene; raises if a fault is not handled.
        faults: names of its faults, each a row of the table. ``Scene.handled`` counts them.
        racy: whether the outcome depends on timing; such a fault is tried many times.
        quick: whether the test suite includes it.
        slow: whether it takes minutes.
        needs: names in ``NEEDS``.
    """

    function: Function
    faults: tuple[str, ...]
    racy: bool
    quick: bool
    slow: bool
    needs: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.function.__name__

    def not_run(self) -> str | None:
        """Why the case cannot run here, or None."""
        return next((reason for need in self.needs if (reason := NEEDS[need]())), None)


CASES: list[Case] = []


def case(
    *faults: str, racy: bool = False, quick: bool = False, slow: bool = False, needs: tuple[str, ...] = ()
) -> Callable[[Function], Function]:
    """Add the decorated function to the list."""

    def register(function: Function) -> Function:
        CASES.append(Case(function, faults, racy, quick, slow, needs))
        return function

    return register


@cache
def _mounts() -> str | None:
    if os.geteuid() != 0:
        return "mounting requires root"
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    done = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "x", "/mnt"], capture_output=True, check=False)
    return None if done.returncode == 0 else "this container does not allow mounts"


def faketime() -> Path | None:
    """The path of libfaketime, which shows a wrong clock to a process, or None if it is not installed."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)


def _setting(name: str) -> Callable[[], str | None]:
    return lambda: None if name in default_settings() else f"there is no setting {name}"


def _module(name: str) -> Callable[[], str | None]:
    return lambda: None if find_spec(name) else f"there is no {name}"


NEEDS: dict[str, Callable[[], str | None]] = {
    "linux": lambda: None if Path("/proc/self/environ").exists() else "there is no /proc",
    "no gpu": lambda: "there is a GPU" if Path("/dev/nvidia0").exists() else None,
    "mounts": _mounts,
    "faketime": lambda: None if faketime() else "libfaketime is not installed",
    "restarts": _setting("launcher.max_restarts"),
    "watchdog": _setting("launcher.max_restarts"),
    "stopping": _setting("train.max_seconds"),
    "sync": _module("cifar_exp.cli.sync"),
    "stale": _module("cifar_exp.tracking.dead_runs"),
    "ui": _module("cifar_exp.cli.ui"),
}
