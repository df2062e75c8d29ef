"""Parts of the package with their default settings from ``conf/``; their signatures have no defaults."""

from collections.abc import Callable
from functools import partial
from typing import Any

from cifar_exp.config.defaults import conf_dir, settings_of


def with_defaults(part: Callable[..., Any]) -> "partial[Any]":
    """``part`` with the settings of its YAML file, except ``root``: each test has its own folder."""
    (path,) = conf_dir().glob(f"*/{part.__name__.lower()}.yaml")
    settings = settings_of(path.parent.name, path.stem)
    return partial(part, **{name: value for name, value in settings.items() if name != "root"})
