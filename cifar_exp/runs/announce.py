"""Print lines for the user and write them to the run's log."""

import logging
from collections.abc import Sequence

from rich.console import Console

from cifar_exp.system.printable import print_notice


def say(console: Console, lines: Sequence[str]) -> None:
    """Print ``lines`` on the terminal and log them."""
    for line in lines:
        console.print(line, highlight=False)
        logging.getLogger(__name__).info(line)


def warn(line: str) -> None:
    """Print a warning on stderr and log it."""
    print_notice(line)
    logging.getLogger(__name__).warning(line)
