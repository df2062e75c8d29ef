"""`cifar-exp train`: train one run, or every job of a sweep."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:  # heavy imports are inside functions, so that --help and a wrong setting answer at once
    from omegaconf import DictConfig


@click.command("train", add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> int:
    """Train once as configured; with -m, sweep over lists of values."""
    from cifar_exp.cli.hydra_app import run_hydra

    return run_hydra(run_job, words)


def run_job(composed: "DictConfig") -> float:
    """Train one run. Hydra calls this for a single run and for each job of a sweep.

    Args:
        composed: the composed configuration.

    Returns:
        The test accuracy, 0 to 1.
    """
    from cifar_exp.config.reading import read_config
    from cifar_exp.launch.forkserver import warm_up
    from cifar_exp.runs.components import build
    from cifar_exp.system.surroundings import settle

    config = read_config(composed)
    settle()
    warm_up()
    parts = build(config)

    from cifar_exp.cli.hydra_app import run_context
    from cifar_exp.runs.run import run

    return run(config, parts, run_context()).test_accuracy
