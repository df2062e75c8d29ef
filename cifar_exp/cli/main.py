"""Command line -> composed config -> plan -> launch: one run, or one job of a sweep."""

import sys
from typing import TYPE_CHECKING

from cifar_exp.errors import Stopped
from cifar_exp.system.process import end_process
from cifar_exp.system.signals import answer_signals, ignore_signals, swallowed

if TYPE_CHECKING:  # everything heavy is imported where it is first needed: --help and a wrong setting answer at once
    from omegaconf import DictConfig


def main() -> None:
    """The command `cifar-exp`."""
    answer_signals()
    try:
        from cifar_exp.cli.hydra_app import run_hydra

        code = run_hydra(run_job)
        ignore_signals()
    except (Stopped, Exception) as error:
        if (stopped := Stopped.behind(error) or swallowed()) is None:
            raise  # the entry tells it
        print(f"cifar-exp: {stopped}", file=sys.stderr)
        code = stopped.exit_code
    end_process(code)


def run_job(composed: "DictConfig") -> float:
    """Train once as ``composed`` says; what Hydra calls for a run and for each job of a sweep. The test accuracy."""
    from cifar_exp.config.reading import read_config
    from cifar_exp.launch.forkserver import warm_up
    from cifar_exp.runs.components import build
    from cifar_exp.system.surroundings import settle

    config = read_config(composed)
    settle()
    warm_up()
    parts = build(config)

    from cifar_exp.runs.run import run

    return run(config, parts)


if __name__ == "__main__":
    main()
