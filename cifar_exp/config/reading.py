"""Convert Hydra's composed configuration to the typed one and check every setting."""

import json
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from cifar_exp.config import hydra_versions
from cifar_exp.config.defaults import conf_dir
from cifar_exp.config.messages import invalid_setting
from cifar_exp.config.mlflow_settings import with_environment
from cifar_exp.config.schema import COMMON, Config
from cifar_exp.config.targets import RENAMED, check_targets, with_names
from cifar_exp.errors import ConfigError
from cifar_exp.system.bugs import first_cause, is_bug, raised_in
from cifar_exp.system.cpu_quota import usable_cores
from cifar_exp.system.slurm_hosts import SlurmHosts

SECTIONS = ("data", "augment", "model", "optimizer", "schedule", "launcher", "tracking")
ClosedSection = TypeVar("ClosedSection")


def register_resolvers() -> None:
    """Register the resolvers of the YAML files.

    ``${cores:N}``: the smaller of N and the number of cores that this process may use. ``${slurm_step:hosts}``: a field
    of :class:`SlurmHosts`.
    """
    hydra_versions.register_resolver("cores", _cores)
    hydra_versions.register_resolver("slurm_step", _slurm_step)


def _cores(wanted: Any) -> int:
    if not isinstance(wanted, int):
        raise ValueError(f"cores:{wanted}: it must be a whole number")
    return min(wanted, usable_cores())


def _slurm_step(field: str) -> int | str:
    value: int | str = getattr(SlurmHosts.here(), field)
    return value


def read_config(composed: DictConfig) -> Config:
    """Convert the composed configuration to the typed one and check every setting of the package.

    Args:
        composed: the configuration without the section ``hydra``.

    Raises:
        ConfigError: a setting is unknown, has a wrong type, is out of range or not trusted. The first one is named.
    """
    try:
        plain: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        # Our own resolvers raise ValueError for a wrong argument. Any other error of theirs is a bug.
        behind = first_cause(error)
        if isinstance(behind, ConfigError):
            raise behind from None
        if is_bug(behind) and not isinstance(behind, ValueError) and raised_in(behind) == "cifar_exp":
            raise behind from None
        raise ConfigError(f"{error.full_key or 'configuration'}: {error}") from error
    plain = with_names(plain, RENAMED)
    if isinstance(plain.get("tracking"), dict):
        plain["tracking"] = with_environment(plain["tracking"])
    config: Config = _validated(Config, plain, "")
    for name in SECTIONS:
        section = plain[name]
        if not isinstance(section.get("_target_"), str):
            choices = ", ".join(sorted(path.stem for path in (conf_dir() / name).glob("*.yaml")))
            raise ConfigError(
                f"{name}: it has no _target_, so no choice of the group is loaded. Set {name}=<{choices}>"
            )
        if name in COMMON:
            _validated(COMMON[name], section, f"{name}.")
        check_targets(name, section, config.trusted_modules)
    return config


def read_section(schema: type[ClosedSection], composed: DictConfig, name: str) -> ClosedSection:
    """Convert one closed section of the composed configuration.

    Args:
        schema: the class of the section.
        composed: the configuration.
        name: the section.

    Raises:
        ConfigError: a setting is missing, unknown, has a wrong type or is out of range.
    """
    section: ClosedSection = _validated(schema, OmegaConf.to_container(composed[name], resolve=True), f"{name}.")
    return section


def _validated(schema: Any, content: Any, prefix: str) -> Any:
    """``content`` as an instance of ``schema``. pydantic's JSON mode is strict about types and accepts mappings."""
    try:
        return TypeAdapter(schema).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise ConfigError(invalid_setting(error, prefix)) from error
