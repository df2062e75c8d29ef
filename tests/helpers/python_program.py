"""Run a Python file as a program, for ``ForkedCommand``: its process is forked after the modules were imported."""

import runpy
import sys

import hydra.main  # noqa: F401 - which is replaced

from cifar_exp.config.hydra_versions import parser_of_old_versions


def main() -> None:
    """Run the file that is the first argument. Without the command's fix, Hydra 1.3 does not start on Python 3.14."""
    del sys.argv[0]
    with parser_of_old_versions():
        runpy.run_path(sys.argv[0], run_name="__main__")
