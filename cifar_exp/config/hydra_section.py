"""Check what a composed configuration would make Hydra call: callbacks, and the classes of Python's logging.

A preset may be untrusted. A setting on the command line, such as ``+hydra.callbacks.mine._target_=mine.Callback``, is
trusted. Hydra 1.4 has its own check of this kind; Hydra 1.3 has none.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
    typed = (section.get("overrides") or {}).get("hydra") or ()
    trusted = (*trusted, *(str(word).partition("=")[2] for word in typed))
    _check(section.get("callbacks"), "hydra.callbacks", ("_target_",), trusted)
    for name in ("job_logging", "hydra_logging"):
        _check(section.get(name), f"hydra.{name}", ("class", "()", "factory"), (*LOGGING, *trusted))


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
                raise ConfigError(
                    f"{setting}.{printable(key)}={printable(value)}: it must be one of {', '.join(allowed[:9])} or a "
                    f"part of this package. Remove it"
                )
            _check(value, f"{setting}.{printable(key)}", names, allowed)
    elif isinstance(part, list):
        for index, value in enumerate(part):
            _check(value, f"{setting}.{index}", names, allowed)
    elif isinstance(part, str) and part.startswith(("ext://", "cfg://")) and part not in STREAMS:
        raise ConfigError(f"{setting}={printable(part)}: it must be {' or '.join(STREAMS)}. Remove it")
