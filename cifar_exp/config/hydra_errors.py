"""Classify Hydra's errors by cause: the command line, the disk, or a bug.

Exceptions of Hydra's and OmegaConf's own classes are about the command line. For other exceptions, such as a bare
``ValueError``, the configuration is composed once more with single overrides. An override is the cause if composing
with it fails in the same way and composing without it does not.
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TypeGuard

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
    SearchPathException,
)
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml import YAMLError

from cifar_exp.config import hydra_versions
from cifar_exp.config.arguments import argument
from cifar_exp.config.defaults import conf_dir
from cifar_exp.config.hydra_versions import composing
from cifar_exp.config.messages import nearest, unknown_setting
from cifar_exp.errors import CifarExpError, ConfigError, StorageError
from cifar_exp.system.bugs import MACHINE_ERRNOS, is_bug, origin

OWN, HYDRA = "cifar_exp", "hydra"
# These errors are about a value from the user, whichever package raises them.
OF_THE_VALUE = (InterpolationKeyError, InterpolationResolutionError, MissingMandatoryValue)
PLAIN = "seed=0"  # an override that always composes


def explained(error: Exception, typed: Sequence[str]) -> CifarExpError | None:
    """Translate an error of Hydra to a message with setting, rule and nearest valid choice.

    Args:
        error: the exception, raised before the first job.
        typed: the words of the command line. The message names them if the error names none of them.

    Returns:
        The message; None if the error is a bug.
    """
    file = hydra_versions.given_options(typed).get("experimental_rerun")
    if file is not None and not (is_bug(error) and origin(error, OWN, HYDRA) == OWN):  # before a job, Hydra reads it
        return ConfigError(
            f"--experimental-rerun={file}: it cannot be read: {str(error) or type(error).__name__}. Set it to "
            f"{hydra_versions.RERUN_SOURCE}"
        )
    if problem := _option_error(error, typed) or _sweep_error(error, typed):
        return problem
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        options = [str(option) for option in error.options or []]
        if not any(choice in re.split(r"[=,()\[\]]", word)[1:] for word in typed):  # a value, or one of several
            where = str(error).partition("\n")[0]
            return ConfigError(f"{where}: its defaults list names a missing file. Correct the list")
        return ConfigError(f"{group or choice}={choice}: there is no such choice. {nearest(choice, options)}")
    cause = error.__cause__
    key = cause.full_key if isinstance(error, ConfigCompositionException) and _is_omegaconf_error(cause) else ""
    if key and any(str(key).partition(".")[0] in word for word in typed):  # else it is of something internal
        return ConfigError(unknown_setting(key))
    if isinstance(error, OverrideParseException):
        return ConfigError(_unreadable(str(error.override)))
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return _file_error(error)
    if isinstance(error, UnicodeDecodeError) and (file := _not_utf8(typed)):
        return ConfigError(f"{file}: the file is not in UTF-8: {error}. Save it in UTF-8")
    if isinstance(error, YAMLError):
        return ConfigError(f"a file of the configuration cannot be read: {' '.join(str(error).split())}. Fix the file")
    text = str(error) or str(cause or type(error).__name__)
    words = causing_words(error, typed)
    if not words and not _is_user_error(error):
        return None
    if not any(word.lstrip("+~").partition("=")[0] in text for word in typed):
        text = f"{' '.join(words or typed)}: {text}"
    return ConfigError(f"{text}. Write group=choice or key=value, as in model=convnet train.epochs=5; see --help")


def _option_error(error: Exception, typed: Sequence[str]) -> ConfigError | None:
    """The message for a ``--config-name``, ``--config-path`` or ``--config-dir`` that does not exist."""
    if not isinstance(error, MissingConfigException | SearchPathException):
        return None
    given = hydra_versions.given_options(typed)
    name, path, more = (given.get(option) for option in ("config_name", "config_path", "config_dir"))
    if more is not None and not Path(more).is_dir():
        return ConfigError(f"--config-dir={more}: there is no such folder. Set it to a folder with your own choices")
    if path is not None and not (Path(path) / f"{name or 'config'}.yaml").is_file():
        lacks = f"it has no {name or 'config'}.yaml" if Path(path).is_dir() else "there is no such folder"
        return ConfigError(
            f"--config-path={path}: {lacks}. Leave it out: your own choices are added with --config-dir=<folder>"
        )
    if name is not None and getattr(error, "missing_cfg_file", "") in (name, f"{name}.yaml"):
        return ConfigError(
            f"--config-name={name}: there is no such file among the configurations. Leave it out for config.yaml, or "
            f"add --config-dir=<folder with {name}.yaml>"
        )
    return None


def _sweep_error(error: Exception, typed: Sequence[str]) -> ConfigError | None:
    """The message for an override with several values without ``-m``."""
    if not isinstance(error, HydraException) or hydra_versions.given_options(typed).get("multirun"):
        return None
    for word in typed:
        with suppress(HydraException):
            if not word.startswith("-") and OverridesParser.create().parse_override(word).is_sweep_override():
                key, _, values = word.partition("=")
                message = f"{word}: several values are a sweep. Add -m to sweep, as in cifar-exp -m {shlex.quote(word)}"
                return ConfigError(message if "(" in values else f"{message}; a list is written {key}=[{values}]")
    return None


def _not_utf8(typed: Sequence[str]) -> Path | None:
    """The first YAML file of the folders in the command line that is not in UTF-8."""
    given = hydra_versions.given_options(typed)
    for folder in filter(None, (given.get("config_dir"), given.get("config_path"))):
        for path in sorted(Path(folder).rglob("*.yaml")):
            try:
                path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                return path
    return None


def _unreadable(word: str) -> str:
    """The message for a word that Hydra's grammar cannot parse, with the corrected word."""
    key, equals, value = word.partition("=")
    if not equals or not key:
        return f"{word}: it cannot be read as an override. Write key=value, as in train.epochs=5"
    if value.lstrip()[:1] in ("[", "{"):
        return f"{word}: it cannot be read as an override. Write a list as [a,b] and a mapping as {{a:1,b:2}}"
    return f"{word}: it cannot be read as an override. In a shell, write {argument(key, value)}"


def _is_omegaconf_error(error: BaseException | None) -> TypeGuard[OmegaConfBaseException]:
    return isinstance(error, OmegaConfBaseException)


def _is_user_error(error: Exception) -> bool:
    """Whether the error's class is for user errors and Hydra, not this package, triggered it."""
    if isinstance(error, OF_THE_VALUE):
        return True
    return isinstance(error, HydraException | OmegaConfBaseException) and origin(error, OWN, HYDRA) == HYDRA


def causing_words(error: Exception, typed: Sequence[str]) -> list[str]:
    """The words that cause this error; empty if Hydra also fails without them, or for another reason."""
    if origin(error, OWN, HYDRA) != HYDRA or _fails_alike(error, [PLAIN]):
        return []
    overrides = [word for word in typed if not word.startswith("-")]
    for words in (*([word] for word in overrides), overrides):
        if _fails_alike(error, words):
            return words
    # Composing does not apply Hydra's own settings, such as those of Python's logging, nor its flags.
    is_refused = isinstance(error, ValueError | RuntimeError | ImportError)
    return [word for word in typed if is_refused and (word.lstrip("+~").startswith("hydra") or word.startswith("--"))]


def _fails_alike(error: Exception, overrides: Iterable[str]) -> bool:
    try:
        with nullcontext() if GlobalHydra().is_initialized() else composing(conf_dir()):
            compose("config", list(overrides))
    except Exception as failure:
        return type(failure) is type(error)
    return False


def _file_error(error: OSError) -> CifarExpError | None:
    """The message for a file error. Hydra only reads the configuration and creates the run folder and its log."""
    if error.errno not in MACHINE_ERRNOS and not isinstance(
        error, FileExistsError | NotADirectoryError | FileNotFoundError
    ):
        return None
    with suppress(TypeError, ValueError):
        if str(error.filename).endswith((".yaml", ".yml")) and origin(error, OWN, HYDRA) == HYDRA:
            return ConfigError(f"{error.filename}: the configuration cannot be read: {error.strerror}. Fix the file")
    return StorageError(f"hydra.run.dir (hydra.sweep.dir with -m): {error}. Set it to a folder that you may write to")
