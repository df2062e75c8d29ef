"""Train a run from a composed configuration. Slow imports come after the settings were checked."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from cifar_exp.config.reading import read_config
from cifar_exp.config.schema import Config
from cifar_exp.data.presence import check_presence
from cifar_exp.runs.context import Result, RunContext

if TYPE_CHECKING:
    from cifar_exp.runs.components import Components


def train_composed(
    composed: DictConfig,
    context: RunContext,
    opened: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Result:
    """Train one run: read the settings, build the components, run.

    Args:
        composed: the composed configuration, without the section ``hydra``.
        context: the run folder, overrides and sweep.
        opened: the context in which the run is trained. It is entered after the components were built.

    Raises:
        CifarExpError: a setting is wrong, or the run failed.
    """
    config = read_config(composed)
    components = build_components(config)
    from cifar_exp.runs.run import run

    with opened():
        return run(config, components, context)


def check_composed(composed: DictConfig) -> Config:
    """Check the settings of a job and the folder of its images before it starts. Returns the typed configuration.

    Raises:
        CifarExpError: something is wrong.
    """
    config = read_config(composed)
    check_presence(config.data)
    return config


def build_components(config: Config) -> "Components":
    """Set up the environment, start the fork server, and build the components while it imports PyTorch.

    Raises:
        ConfigError: a component cannot be built with its settings.
        DataError: the folder of the images does not exist.
    """
    from cifar_exp.launch.forkserver import start_fork_server
    from cifar_exp.runs.components import build
    from cifar_exp.system.surroundings import set_up_environment

    check_presence(config.data)  # before the imports that take seconds
    set_up_environment()
    start_fork_server()
    return build(config)
