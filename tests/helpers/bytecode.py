"""Cache bytecode for the many test processes when the environment has none.

If ``PYTHONDONTWRITEBYTECODE`` is set and the installed packages have no bytecode (``uv sync`` writes none), each
process compiles all its imports: torch, torchvision, MLflow and Hydra take 14 seconds in place of 6. In this case the
tests write bytecode to a folder beside pytest's own cache, and none beside the sources.
"""

import importlib.util
import os
import sys
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".pytest_cache" / "bytecode"


def keep_bytecode() -> None:
    """Enable the bytecode cache for this process and its children."""
    found = importlib.util.find_spec("torch")
    if not sys.dont_write_bytecode or (found and found.cached and Path(found.cached).exists()):
        return
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(CACHE)
    sys.dont_write_bytecode = False
