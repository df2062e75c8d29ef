"""The way in: what cannot run here is refused in one line, and an error that nobody expected is told as a bug.

Older versions of Python must be able to read this module, or they would show a traceback in place of that line.
"""

import sys


def main() -> None:
    """The command `cifar-exp`, with what was typed."""
    try:
        from cifar_exp.cli.main import main as run

        run()
    except Exception as error:
        from cifar_exp.system.bugs import told

        problem = told(error)
        sys.stderr.write(f"cifar-exp: {problem}\n")
        sys.exit(problem.exit_code)


if __name__ == "__main__":
    main()
