"""Print lines for the user and write them to the run's log."""

import logging
import sys
from collections.abc import Sequence

from rich.console import Console


def say(console: Console, lines: Sequence[str]) -> None:
    """Print ``lines`` on the terminal and log them."""
    for line in lines:
        console.print(line, highlight=False)
        logging.getLogger(__name__).info(line)


def warn(line: str) -> None:
    """Print a warning on stderr and log it."""
    print(f"cifar-exp: {line}", file=sys.stderr, flush=True)
    logging.getLogger(__name__).warning(line)
