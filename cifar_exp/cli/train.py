"""`cifar-exp train`: train one run, or every job of a sweep."""

import re
from typing import TYPE_CHECKING

import click

from cifar_exp.system.scheduler import refuse_many_processes

if TYPE_CHECKING:  # heavy imports are inside functions, so that --help and a wrong setting answer at once
    from omegaconf import DictConfig

    from cifar_exp.runs.context import RunContext

# Hydra's options that only print something.
QUESTIONS = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc"}


OTHER_HOST = re.compile(r"\+*launcher\.host_rank=[1-9]\d*")


@click.command("train", add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> int:
    """Train once as configured; with -m, sweep over lists of values."""
    if not QUESTIONS & {word.partition("=")[0] for word in words}:
        refuse_many_processes()
    if any(OTHER_HOST.fullmatch(word) for word in words):
        return run_other_host(words)
    from cifar_exp.cli.hydra_app import run_hydra

    return run_hydra(run_job, words, check)


def run_other_host(words: tuple[str, ...]) -> int:
    """Run ranks for host 0 of a run over several hosts. This host gets no run folder.

    Raises:
        CifarExpError: see ``join_run``.
    """
    from cifar_exp.cli.hydra_app import composed
    from cifar_exp.runs.train_composed import join_composed

    join_composed(composed(words))
    return 0


def check(composed: "DictConfig") -> None:
    """Check a job of a sweep before the first one starts.

    Raises:
        CifarExpError: something is wrong.
    """
    from cifar_exp.runs.train_composed import check_composed
    from cifar_exp.system.host import may_have_apples_gpu

    wanted = check_composed(composed).devices
    if wanted.accelerator == "mps" or (wanted.accelerator == "auto" and may_have_apples_gpu()):
        from cifar_exp.launch.devices import check_apples_gpu  # it imports PyTorch

        check_apples_gpu(wanted)


def run_job(composed: "DictConfig", context: "RunContext") -> float:
    """Train one run: a single one, or a job of a sweep. Returns the test accuracy, 0 to 1, for Hydra's sweepers."""
    from cifar_exp.runs.train_composed import train_composed

    refuse_many_processes()  # a Hydra launcher may have started this process
    return train_composed(composed, context).test_accuracy
