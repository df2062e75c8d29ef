"""The config hash of a run, and the settings that differ between two runs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cifar_exp.config.defaults import flattened
from cifar_exp.config.result_settings import bears_on_result
from cifar_exp.config.schema import Config
from cifar_exp.config.stored import stored_config, stored_params
from cifar_exp.config.targets import FIRST_NAMES, with_names
from cifar_exp.records.run_folder import CONFIG_FILE
from cifar_exp.system.redaction import masked

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, YAMLError, OmegaConfBaseException)


def config_hash(config: Config) -> str:
    """The sha256, in hex, of all settings that affect the result. Passwords are masked first and do not affect it."""
    return hashlib.sha256(json.dumps(result_settings(config), sort_keys=True).encode()).hexdigest()


def result_settings(config: Config) -> dict[str, Any]:
    """All settings that affect the result, by their dotted names, in JSON's types. Passwords are masked."""
    plain = with_names(masked(asdict(config)), FIRST_NAMES)  # the first names keep hashes of earlier versions valid
    return {name: value for name, value in _settings(plain).items() if bears_on_result(name)}


def changed_settings(folder: Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that affect the result and differ from the run in ``folder``: name -> (old, new)."""
    return _differences(_settings(config_of(folder)), config)


def has_same_settings(info: Mapping[str, Any], config: Config) -> bool:
    """Whether the run of a ``run.json`` has these settings. A setting that it lacks counts as its default."""
    return info["config_hash"] == config_hash(config) or not _differences(stored_params(info["params"]), config)


def _differences(before: Mapping[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    now = _settings(masked(asdict(config)))
    return {
        name: (before.get(name), now.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and bears_on_result(name)
    }


def config_of(folder: Path) -> dict[str, Any]:
    """The resolved configuration of the run in ``folder``."""
    return stored_config(folder / CONFIG_FILE)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted name. Tuples become lists, as in JSON and YAML."""
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return flattened(plain)
