"""The other hosts take part in every job of one command. This module closes their connection at its end.

It imports nothing slow: every command enters the context, and few have other hosts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cifar_exp.errors import CifarExpError, Stopped

if TYPE_CHECKING:
    from cifar_exp.launch.host_zero import HostZero

opened: "list[HostZero]" = []  # at most one


@contextmanager
def closing_host_zero() -> Iterator[Callable[[int], None]]:
    """At the end of this context, tell other hosts that the command has ended. Yields what takes its exit code."""
    codes = [1]
    try:
        yield codes.append
    except (CifarExpError, Stopped) as error:
        codes.append(error.exit_code)
        raise
    finally:
        while opened:
            opened.pop().close(codes[-1])
