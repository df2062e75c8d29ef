"""Sort Hydra's errors by cause: the command line, the disk, or a bug.

Exceptions of Hydra's and OmegaConf's own classes are about the command line. For other exceptions, such as a bare
``ValueError``, the configuration is composed once more with single overrides. An override is the cause if composing
with it fails in the same way and composing without it does not.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from typing import TypeGuard

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml import YAMLError

from cifar_exp.config.defaults import conf_dir
from cifar_exp.config.hydra_versions import composing
from cifar_exp.config.messages import nearest, unknown_setting
from cifar_exp.errors import CifarExpError, ConfigError, StorageError
from cifar_exp.system.bugs import REFUSALS, origin

OWN, HYDRA = "cifar_exp", "hydra"
# These errors are about a value that the user wrote, whichever package raises them.
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
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        options = [str(option) for option in error.options or []]
        return ConfigError(f"{group or choice}={choice}: there is no such choice. {nearest(choice, options)}")
    cause = error.__cause__
    key = cause.full_key if isinstance(error, ConfigCompositionException) and _is_of_omegaconf(cause) else ""
    if key and any(str(key).partition(".")[0] in word for word in typed):  # else it is of something internal
        return ConfigError(unknown_setting(key))
    if isinstance(error, OverrideParseException):
        return ConfigError(f"{error.override}: it cannot be read as an override. Set key=value; quote lists and spaces")
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return _of_the_disk(error)
    if isinstance(error, YAMLError):
        return ConfigError(f"a file of the configuration cannot be read: {' '.join(str(error).split())}. Fix the file")
    text = str(error) or str(cause or type(error).__name__)
    words = causing_words(error, typed)
    if not words and not _is_for_the_user(error):
        return None
    if not any(word.lstrip("+~").partition("=")[0] in text for word in typed):
        text = f"{' '.join(words or typed)}: {text}"
    return ConfigError(f"{text}. Write group=choice or key=value, as in model=convnet train.epochs=5; see --help")


def _is_of_omegaconf(error: BaseException | None) -> TypeGuard[OmegaConfBaseException]:
    return isinstance(error, OmegaConfBaseException)


def _is_for_the_user(error: Exception) -> bool:
    """Whether the error's class is for user errors and Hydra, not this package, triggered it."""
    if isinstance(error, OF_THE_VALUE):
        return True
    return isinstance(error, HydraException | OmegaConfBaseException) and origin(error, OWN, HYDRA) == HYDRA


def causing_words(error: Exception, typed: Sequence[str]) -> list[str]:
    """The words that cause this error; none if Hydra fails without them, too, or for another reason."""
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


def _of_the_disk(error: OSError) -> CifarExpError | None:
    """The message for a file error. Hydra only reads the configuration and creates the run folder and its log."""
    if error.errno not in REFUSALS and not isinstance(error, FileExistsError | NotADirectoryError | FileNotFoundError):
        return None
    with suppress(TypeError, ValueError):
        if str(error.filename).endswith((".yaml", ".yml")) and origin(error, OWN, HYDRA) == HYDRA:
            return ConfigError(f"{error.filename}: the configuration cannot be read: {error.strerror}. Fix the file")
    return StorageError(f"hydra.run.dir (hydra.sweep.dir with -m): {error}. Set it to a folder that you may write to")
