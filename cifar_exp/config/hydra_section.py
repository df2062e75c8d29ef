"""Check what a composed configuration would make Hydra call: callbacks, and the classes of Python's logging.

A preset may be untrusted. A setting on the command line, such as ``+hydra.callbacks.mine._target_=mine.Callback``, is
trusted. Hydra 1.4 has its own check of this kind; Hydra 1.3 has none.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from cifar_exp.config.targets import matches
from cifar_exp.errors import ConfigError
from cifar_exp.system.printable import printable

# Handlers that write to a terminal or a file; others would send the log to another machine or start a program.
LOGGING = (
    *("logging.Formatter", "logging.StreamHandler", "logging.FileHandler", "logging.NullHandler"),
    *("logging.handlers.RotatingFileHandler", "logging.handlers.TimedRotatingFileHandler"),
    *("colorlog.ColoredFormatter", "colorlog.formatter.ColoredFormatter", "rich.logging.RichHandler"),
)
CALLED = ("hydra.callbacks", "hydra.job_logging", "hydra.hydra_logging")  # the settings from which Hydra calls code
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def check_hydra_section(config: DictConfig, trusted: Iterable[str]) -> None:
    """Check the section ``hydra`` of a composed configuration. Nothing is imported.

    Args:
        config: the configuration.
        trusted: the allowed `_target_`s: dotted paths, or modules with ``.*``.

    Raises:
        ConfigError: a `_target_` is not allowed. The message names the setting.
    """
    section: Any = OmegaConf.to_container(config.hydra, resolve=False)
    typed = section.get("overrides") or {}
    trusted = (*trusted, *typed_targets([*(typed.get("hydra") or ()), *(typed.get("task") or ())]))
    _check(section.get("callbacks"), "hydra.callbacks", ("_target_",), trusted)
    for name in ("job_logging", "hydra_logging"):
        _check(section.get(name), f"hydra.{name}", ("class", "()", "factory"), (*LOGGING, *trusted))


def typed_targets(overrides: Sequence[str]) -> list[str]:
    """The `_target_`s that these overrides allow for Hydra's own section.

    They are the texts in values of :data:`CALLED`, such as ``+hydra.callbacks.mine._target_=mine.Callback``, and
    everything in ``trusted_modules``.
    """
    targets: list[str] = []
    for word in overrides:
        name = word.partition("=")[0].lstrip("+~")
        if name == "trusted_modules" or name.startswith(CALLED):
            with suppress(HydraException):  # reported when Hydra parses the word
                texts = _texts(OverridesParser.create().parse_override(word).value())
                targets += [f"{text}.*" for text in texts] if name == "trusted_modules" else texts
    return [target for target in targets if re.fullmatch(r"[\w.]+(\.\*)?", target)]


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for part in value.values() for text in _texts(part)]
    if isinstance(value, list):
        return [text for part in value for text in _texts(part)]
    return [str(value)]


def check_typed_trust(config: Mapping[Any, Any] | DictConfig, overrides: Sequence[str]) -> None:
    """Check that ``trusted_modules`` was typed. `trusted_modules` in a file is ignored.

    Raises:
        ConfigError: it was not.
    """
    modules = config.get("trusted_modules")
    if modules and not any(word.lstrip("+~").startswith("trusted_modules") for word in overrides):
        shown = printable(",".join(map(str, modules)))
        raise ConfigError(
            f"trusted_modules=[{shown}]: a file of the configuration sets it, and it counts only where it is typed. If "
            f"you trust that code, set 'trusted_modules=[{shown}]'"
        )


def _check(part: Any, setting: str, names: Sequence[str], allowed: Sequence[str]) -> None:
    if isinstance(part, Mapping):
        for key, value in part.items():
            if key in names and not matches(str(value), allowed):
                module = printable(str(value).rpartition(".")[0] or value)
                raise ConfigError(
                    f"{setting}.{printable(key)}={printable(value)}: a file of the configuration names this code, and "
                    f"Hydra would run it. Remove it or, if you trust it, set 'trusted_modules=[{module}]'"
                )
            _check(value, f"{setting}.{printable(key)}", names, allowed)
    elif isinstance(part, list):
        for index, value in enumerate(part):
            _check(value, f"{setting}.{index}", names, allowed)
    elif isinstance(part, str) and part.startswith(("ext://", "cfg://")) and part not in STREAMS:
        raise ConfigError(f"{setting}={printable(part)}: it must be {' or '.join(STREAMS)}. Remove it")
