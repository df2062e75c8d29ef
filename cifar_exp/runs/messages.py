"""Lines for the user that the run's log keeps, too."""

import logging
import sys
from collections.abc import Sequence

from rich.console import Console


def say(console: Console, lines: Sequence[str]) -> None:
    """Print ``lines`` on the terminal."""
    for line in lines:
        console.print(line, highlight=False)
        logging.getLogger(__name__).info(line)


def warn(line: str) -> None:
    """Print a warning on stderr."""
    print(f"cifar-exp: {line}", file=sys.stderr, flush=True)
    logging.getLogger(__name__).warning(line)
