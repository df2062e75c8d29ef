"""All that differs between the versions of Hydra (1.3, 1.4) and OmegaConf (2.3, 2.4) that may be installed.

Told apart by what they offer, not by their numbers, so that release candidates and later versions need no entry here.
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

# Since 1.4. Such a version limits what a configuration may call itself, and deprecates `version_base`.
_LIMITS_TARGETS = "execution_whitelist" in inspect.signature(hydra.main).parameters
_BASE: dict[str, Any] = {} if _LIMITS_TARGETS else {"version_base": "1.3"}


def run_command(job: Callable[[DictConfig], Any], folder: Path, trusted: Iterable[str]) -> None:
    """Let Hydra read ``sys.argv`` and run ``job`` with the configuration, or for each job of a sweep.

    Args:
        job: is called with the composed configuration.
        folder: of the configuration ``config``.
        trusted: what a configuration may name, that of Python's logging included: dotted paths, or modules with ``.*``.
    """
    limit: dict[str, Any] = {"execution_whitelist": list(trusted)} if _LIMITS_TARGETS else {}
    with _parser_of_old_versions():
        hydra.main(config_path=str(folder), config_name="config", **_BASE, **limit)(job)()


def options() -> dict[str, argparse.Action]:
    """Hydra's options for the command line, by each of their spellings."""
    with _parser_of_old_versions():
        parser: argparse.ArgumentParser = sys.modules["hydra.main"].get_args_parser()
    return dict(parser._option_string_actions)


@contextmanager
def composing(folder: Path) -> Iterator[None]:
    """``hydra.compose`` reads ``folder`` in the block."""
    with initialize_config_dir(str(folder), **_BASE):
        yield


def limited_to(trusted: Iterable[str]) -> AbstractContextManager[Any]:
    """In the block Hydra instantiates what ``trusted`` names and nothing else, where it can be told so."""
    limit = getattr(utils, "execution_whitelist", None)
    return limit(list(trusted)) if limit else nullcontext()


def register_resolver(name: str, resolver: Callable[..., Any]) -> None:
    """``${name:...}`` in YAML is what ``resolver`` returns."""
    register: Callable[..., Any] = OmegaConf.register_resolver
    if "replace" not in inspect.signature(register).parameters:  # 2.3, where this name is an older, deprecated function
        register = OmegaConf.register_new_resolver
    register(name, resolver, replace=True)


@contextmanager
def _parser_of_old_versions() -> Iterator[None]:
    """Hydra 1.3 on Python 3.14: it gives argparse a help that is no string, which argparse looks at since then.

    To be removed once Hydra 1.3 is no longer allowed: 1.4 does the same for its own parser.
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
