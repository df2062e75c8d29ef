"""Configurations as the command line composes them."""

from hydra import compose
from omegaconf import DictConfig

from cifar_exp.config.defaults import conf_dir
from cifar_exp.config.hydra_versions import composing
from cifar_exp.config.reading import register_resolvers


def composed(*overrides: str) -> DictConfig:
    register_resolvers()
    with composing(conf_dir()):
        return compose("config", list(overrides))
