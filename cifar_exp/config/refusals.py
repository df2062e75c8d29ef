"""What Hydra refuses, sorted by where it comes from: from what was typed, from the disk, or from a bug.

Hydra's and OmegaConf's own exceptions are meant for whoever typed. Of others, as a bare ``ValueError``, only a try
tells: what fails without the words that were typed, too, is not their fault.
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
# Whoever asks for the value: it was typed, or stands in a file of the user's.
OF_THE_VALUE = (InterpolationKeyError, InterpolationResolutionError, MissingMandatoryValue)
PLAIN = "seed=0"  # an override that every sound Hydra can read


def explained(error: Exception, typed: Sequence[str]) -> CifarExpError | None:
    """A message of ours for what Hydra refuses: setting, rule, nearest valid choice. None: it is a bug.

    Args:
        error: what was raised before any job began.
        typed: the words of the command line, which are named where the error names none of them.
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
        return ConfigError(
            f"{error.override}: it cannot be read as an override. Write key=value; quote lists and spaces"
        )
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return _of_the_disk(error)
    if isinstance(error, YAMLError):
        return ConfigError(f"a file of the configuration cannot be read: {' '.join(str(error).split())}. Mend it")
    text = str(error) or str(cause or type(error).__name__)
    words = to_blame(error, typed)
    if not words and not _is_for_the_user(error):
        return None
    if not any(word.lstrip("+~").partition("=")[0] in text for word in typed):
        text = f"{' '.join(words or typed)}: {text}"
    return ConfigError(f"{text}. Write group=choice or key=value, as in model=convnet train.epochs=5; see --help")


def _is_of_omegaconf(error: BaseException | None) -> TypeGuard[OmegaConfBaseException]:
    return isinstance(error, OmegaConfBaseException)


def _is_for_the_user(error: Exception) -> bool:
    """Whether its class says so, and it was Hydra that asked for what it is about."""
    if isinstance(error, OF_THE_VALUE):
        return True
    return isinstance(error, HydraException | OmegaConfBaseException) and origin(error, OWN, HYDRA) == HYDRA


def to_blame(error: Exception, typed: Sequence[str]) -> list[str]:
    """The words that make Hydra fail like this; none where it fails without them, too, or not because of them."""
    if origin(error, OWN, HYDRA) != HYDRA or _fails_alike(error, [PLAIN]):
        return []
    overrides = [word for word in typed if not word.startswith("-")]
    for words in (*([word] for word in overrides), overrides):
        if _fails_alike(error, words):
            return words
    # What Hydra does with its own settings, as with those of Python's logging, no composition tries; nor its flags.
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
    """Hydra has nothing to do with files but to read the configuration and to make the run's folder and its log."""
    if error.errno not in REFUSALS and not isinstance(error, FileExistsError | NotADirectoryError | FileNotFoundError):
        return None
    with suppress(TypeError, ValueError):
        if str(error.filename).endswith((".yaml", ".yml")) and origin(error, OWN, HYDRA) == HYDRA:
            return ConfigError(f"{error.filename}: the configuration cannot be read: {error.strerror}. Mend that")
    return StorageError(f"hydra.run.dir (hydra.sweep.dir with -m): {error}. Set it to a folder that you may write to")
