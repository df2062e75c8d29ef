"""The differences between the supported versions of Hydra (1.3, 1.4) and OmegaConf (2.3, 2.4).

The version is detected by its features, not by its number, so release candidates and later versions work, too.
"""

import argparse
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hydra
from hydra import initialize_config_dir, utils
from omegaconf import DictConfig, OmegaConf

# Hydra 1.4 has its own allow-list of `_target_`s and deprecates `version_base`.
_LIMITS_TARGETS = "execution_whitelist" in inspect.signature(hydra.main).parameters
_BASE: dict[str, Any] = {} if _LIMITS_TARGETS else {"version_base": "1.3"}


def run_command(job: Callable[[DictConfig], Any], folder: Path, trusted: Iterable[str]) -> None:
    """Let Hydra parse ``sys.argv`` and run ``job``, once or for each job of a sweep.

    Args:
        job: the function to call with the composed configuration.
        folder: the folder of ``config.yaml``.
        trusted: the `_target_`s that a configuration may have, including those for Python's logging: dotted paths, or
            modules with ``.*``.
    """
    limit: dict[str, Any] = {"execution_whitelist": list(trusted)} if _LIMITS_TARGETS else {}
    with parser_of_old_versions():
        hydra.main(config_path=str(folder), config_name="config", **_BASE, **limit)(job)()


def options() -> dict[str, argparse.Action]:
    """Hydra's command-line options: spelling -> argparse action."""
    with parser_of_old_versions():
        parser: argparse.ArgumentParser = sys.modules["hydra.main"].get_args_parser()
    return dict(parser._option_string_actions)


@contextmanager
def composing(folder: Path) -> Iterator[None]:
    """Inside this context ``hydra.compose`` reads ``folder``."""
    with initialize_config_dir(str(folder), **_BASE):
        yield


def limited_to(trusted: Iterable[str]) -> AbstractContextManager[Any]:
    """Inside this context Hydra 1.4 instantiates only the `_target_`s in ``trusted``. Hydra 1.3 has no such limit."""
    limit = getattr(utils, "execution_whitelist", None)
    return limit(list(trusted)) if limit else nullcontext()


def register_resolver(name: str, resolver: Callable[..., Any]) -> None:
    """Register ``resolver`` for ``${name:...}`` in YAML. An earlier one of that name is replaced."""
    register: Callable[..., Any] = OmegaConf.register_resolver
    if "replace" not in inspect.signature(register).parameters:  # OmegaConf 2.3: this name is a deprecated function
        register = OmegaConf.register_new_resolver
    register(name, resolver, replace=True)


@contextmanager
def parser_of_old_versions() -> Iterator[None]:
    """Make Hydra 1.3 work on Python 3.14, where argparse rejects a help text that is not a string.

    Remove this when Hydra 1.3 is no longer supported: Hydra 1.4 has the same workaround.
    """
    module = sys.modules["hydra.main"]  # the name `hydra.main` is the function
    make_parser = module.get_args_parser
    if _LIMITS_TARGETS or not hasattr(argparse.ArgumentParser, "_check_help"):
        yield
        return

    def making() -> argparse.ArgumentParser:
        check = argparse.ArgumentParser._check_help  # type: ignore[attr-defined]

        def check_strings(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
            if isinstance(action.help, str):
                check(parser, action)

        with patch.object(argparse.ArgumentParser, "_check_help", check_strings):
            parser: argparse.ArgumentParser = make_parser()
            return parser

    with patch.object(module, "get_args_parser", making):
        yield
