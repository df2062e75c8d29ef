"""The version of this package."""

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """The version of this package; empty if it is not installed, as when it is run from its source code."""
    try:
        return version("cifar-exp")
    except PackageNotFoundError:
        return ""
