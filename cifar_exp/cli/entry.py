"""The entry point of `cifar-exp`. It reports an unexpected error as a bug, in one message without a traceback.

Older versions of Python must be able to parse this module: they then print one line in place of a traceback.
"""

import sys


def main() -> None:
    """Run the command `cifar-exp` with ``sys.argv``."""
    try:
        from cifar_exp.system.import_path import use_safe_path

        use_safe_path()
        from cifar_exp.cli.main import main as run

        run()
    except Exception as error:
        from cifar_exp.system.bugs import as_user_error
        from cifar_exp.system.printable import printable_text

        problem = as_user_error(error)
        sys.stderr.write(f"cifar-exp: {printable_text(str(problem))}\n")
        sys.exit(problem.exit_code)


if __name__ == "__main__":
    main()
