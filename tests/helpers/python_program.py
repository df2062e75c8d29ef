"""A Python file as a program of its own, for ``ForkedCommand``: it is forked where the modules are imported already."""

import runpy
import sys


def main() -> None:
    """Run the file that is the first argument."""
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
