"""Convert exceptions of a user's network, optimizer or schedule to errors that name the setting."""

import inspect
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cifar_exp.errors import CifarExpError, ConfigError, Stopped
from cifar_exp.system.bugs import described
from cifar_exp.system.signals import raise_swallowed

OTHER_OPTIMIZER = "Set optimizer=sgd, optimizer=adamw, or another one"


@contextmanager
def refusing(what: str, trusted: Sequence[str], remedy: str) -> Iterator[None]:
    """Convert any exception in the block to a ConfigError.

    Args:
        what: the setting and what failed, such as ``model: own.net cannot be built``.
        trusted: the modules of ``trusted_modules``; the message names the innermost line in them.
        remedy: a sentence without the full stop.
    """
    try:
        yield
    except CifarExpError:
        raise
    except (Exception, SystemExit) as error:
        raise_swallowed()
        if stopped := Stopped.cause_of(error):
            raise stopped from None
        raise ConfigError(f"{what}: {described(error)}{_line(error, trusted)}. {remedy}") from error


def _line(error: BaseException, trusted: Sequence[str]) -> str:
    """File and line of the user's code; empty if it is not in the traceback."""
    packages = {module.partition(".")[0] for module in trusted}
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if str(frame.f_globals.get("__name__")).partition(".")[0] in packages:
            return f" ({Path(frame.f_code.co_filename).name}, line {line})"
    return ""


def check_closure(target: Any, path: str) -> None:
    """Raise a ConfigError for an optimizer whose step computes the loss again, such as LBFGS."""
    step = getattr(target, "step", None)
    closure = inspect.signature(step).parameters.get("closure") if step else None
    if closure and closure.default is closure.empty:
        raise ConfigError(
            f"optimizer._target_={path}: its step needs a closure that computes the loss again, which a training step "
            f"does not support. {OTHER_OPTIMIZER}"
        )
