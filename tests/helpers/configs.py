"""Configurations as the command line composes them."""

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from cifar_exp.config.defaults import conf_dir
from cifar_exp.config.reading import register_resolvers


def composed(*overrides: str) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", list(overrides))
