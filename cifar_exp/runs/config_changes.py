"""Which settings bear on a run's result, and which of them differ between two runs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cifar_exp.config.defaults import flattened
from cifar_exp.config.result_settings import bears_on_result
from cifar_exp.config.schema import Config
from cifar_exp.config.targets import FIRST_NAMES, RENAMED, with_names
from cifar_exp.records.run_folder import CONFIG_FILE
from cifar_exp.system.redaction import masked

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, YAMLError, OmegaConfBaseException)


def config_hash(config: Config) -> str:
    """sha256 in hex of every setting that bears on the result; another password makes no other run."""
    plain = with_names(masked(asdict(config)), FIRST_NAMES)  # a run of an earlier version keeps its hash
    settings = {name: value for name, value in _settings(plain).items() if bears_on_result(name)}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _changes(folder: Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that bear on the result and differ from those of the run in ``folder``: (then, now)."""
    before, now = _settings(_config_of(folder)), _settings(masked(asdict(config)))
    return {
        name: (before.get(name), now.get(name))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and bears_on_result(name)
    }


def _config_of(folder: Path) -> dict[str, Any]:
    """The resolved configuration of the run in ``folder``."""
    config: Any = OmegaConf.to_container(OmegaConf.load(folder / CONFIG_FILE))
    if not config:
        raise ValueError(f"{CONFIG_FILE} is empty")
    return dict(with_names(config, RENAMED))


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted settings, tuples as the lists that JSON and YAML make of them."""
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return flattened(plain)
