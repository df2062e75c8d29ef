"""What this package runs on: Python 3.11 to 3.14, not on native Windows. Anything else is refused in one message.

Older versions of Python must be able to read this module, or they would show a traceback in place of that message.
"""

import sys

OLDEST, NEWEST = (3, 11), (3, 14)
STARTS = ("cifar_exp.cli.entry", "cifar_exp.cli.main")
WINDOWS = """native Windows is not supported. Use WSL2, the Linux in Windows:
  wsl --install     once, in PowerShell as administrator
  wsl               opens it: there, in a clone of the project, the two commands of the README"""


def refusal(version: "tuple[int, ...]", platform: str) -> str:
    """Why the package cannot be used here, and what to do; empty if it can."""
    if platform == "win32":
        return WINDOWS
    if OLDEST <= version[:2] <= NEWEST:
        return ""
    this, oldest, newest = [f"{major}.{minor}" for major, minor in (version[:2], OLDEST, NEWEST)]
    return (
        f"this is Python {this} ({sys.executable}), and cifar-exp needs {oldest} to {newest}. Run "
        f"uv run --python {newest} cifar-exp, or make the environment with python{newest} -m venv .venv"
    )


def misstarted(words: "list[str]") -> str:
    """Why ``python -m cifar_exp.<part>`` does nothing, and what to type; empty for other command lines of Python."""
    place = next((place for place, word in enumerate(words) if place and not word.startswith("-")), 0)
    module = words[place] if words[place - 1] == "-m" else ""
    if not module.startswith("cifar_exp.cli.") or module in STARTS:
        return ""
    return f"{module} is part of the command and cannot run alone. Run python -m cifar_exp"


def refuse_others() -> None:
    """End with exit code 2 and one message where the package cannot be used."""
    problem = refusal(sys.version_info[:3], sys.platform) or misstarted(sys.orig_argv)
    if problem:
        sys.stderr.write(f"cifar-exp: {problem}\n")
        sys.exit(2)
