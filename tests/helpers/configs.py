"""Configurations as composed on the command line."""

from functools import cache

from hydra import compose
from omegaconf import DictConfig

from cifar_exp.config.defaults import conf_dir
from cifar_exp.config.hydra_versions import composing
from cifar_exp.config.reading import read_config, register_resolvers
from cifar_exp.config.schema import Config
from cifar_exp.runs.components import build
from cifar_exp.training.optimizers import OptimizerFactory


def composed(*overrides: str) -> DictConfig:
    register_resolvers()
    with composing(conf_dir()):
        return compose("config", list(overrides))


@cache
def default_config() -> Config:
    """All settings at their defaults. Change some with ``dataclasses.replace``."""
    return read_config(composed())


@cache
def muon() -> OptimizerFactory:
    """Muon with the settings of ``optimizer=muon``, except ``lr``."""
    return build(read_config(composed("optimizer=muon", "tracking=none"))).make_optimizer
