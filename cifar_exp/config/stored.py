"""Read the stored configuration of a run, perhaps of an earlier version: rename old settings, add defaults for new
ones, drop removed ones.

A setting that an earlier version did not have counts as its default, so the run can be resumed, predicted with and
compared like a new run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cifar_exp.config.defaults import defaults_beside, flattened
from cifar_exp.config.limited_yaml import load_file
from cifar_exp.config.targets import RENAMED, with_names

_TARGET = "._target_"
# `_target_` -> settings that it had in version 0.1. They described the release and do not affect results.
REMOVED = {"cifar_exp.data.cifar10.cifar10": ("size", "sha256")}


def stored_config(path: Path) -> dict[str, Any]:
    """The configuration in a run's or sweep's file.

    Raises:
        ValueError: the file has no settings.
        OSError, YAMLError, OmegaConfBaseException: the file cannot be read.
    """
    content: Any = OmegaConf.to_container(load_file(path))
    if not content or not isinstance(content, Mapping):
        raise ValueError(f"{path.name} has no settings")
    config: dict[str, Any] = dict(with_names(content, RENAMED))
    sections = {name: part for name, part in config.items() if isinstance(part, Mapping)}
    defaults = defaults_beside({name: part["_target_"] for name, part in sections.items() if "_target_" in part})
    filled = {name: {**defaults[name], **part} for name, part in sections.items() if name in defaults}
    for section, name in _removed({name: part.get("_target_") for name, part in sections.items()}):
        filled.get(section, {}).pop(name, None)
    return defaults | config | filled


def stored_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a configuration with dotted names, as in trackers and ``run.json``."""
    targets = {name: RENAMED.get(str(value), value) for name, value in params.items() if name.endswith(_TARGET)}
    defaults = defaults_beside({name.removesuffix(_TARGET): target for name, target in targets.items()})
    filled = flattened(defaults) | dict(params) | targets
    for section, name in _removed({name.removesuffix(_TARGET): target for name, target in targets.items()}):
        filled.pop(f"{section}.{name}", None)
    return filled


def _removed(targets: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Section and name of each setting that today's components no longer have."""
    return [(section, name) for section, target in targets.items() for name in REMOVED.get(str(target), ())]
