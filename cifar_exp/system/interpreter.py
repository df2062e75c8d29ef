"""The versions of Python that this package is written for. Older ones must be able to read this: it refuses them."""

import sys

OLDEST, NEWEST = (3, 11), (3, 14)


def refusal(version: "tuple[int, ...]") -> str:
    """Why this version cannot be used and what to type; empty where it can."""
    if OLDEST <= version[:2] <= NEWEST:
        return ""
    this, oldest, newest = (f"{major}.{minor}" for major, minor in (version[:2], OLDEST, NEWEST))
    return (
        f"this is Python {this} ({sys.executable}), and cifar-exp needs {oldest} to {newest}. Type "
        f"uv run --python {newest} cifar-exp, or make the environment with python{newest} -m venv .venv"
    )


def refuse_others(program: str) -> None:
    """End with exit code 2 and one line where this is none of them."""
    problem = refusal(sys.version_info[:3])
    if problem:
        print(f"{program}: {problem}", file=sys.stderr)
        sys.exit(2)
