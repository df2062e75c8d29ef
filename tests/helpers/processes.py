"""What the system tells of a process."""

import signal
from pathlib import Path


def answers_signals(pid: int) -> bool:
    """Whether the command has taken charge of SIGTERM, which Python leaves alone."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(line for line in status if line.startswith("SigCgt"))
    return bool(int(mask.split()[1], 16) & 1 << signal.SIGTERM - 1)
