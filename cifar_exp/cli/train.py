"""`cifar-exp train`: train one run, or every job of a sweep."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from cifar_exp.system.scheduler import refuse_many_processes
from cifar_exp.system.slurm_hosts import SlurmHosts

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
    is_slurm = "launcher=slurm" in words
    if not QUESTIONS & {word.partition("=")[0] for word in words}:
        _refuse_many_processes(words)
    if any(OTHER_HOST.fullmatch(word) for word in words) or (is_slurm and SlurmHosts.here().host_rank):
        return run_other_host(words)
    from cifar_exp.cli.hydra_app import run_hydra
    from cifar_exp.launch.host_session import closing_host_zero

    with closing_host_zero() as end:
        code = run_hydra(run_job, words, check)
        end(code)
    return code


def _refuse_many_processes(words: Sequence[str]) -> None:
    """Refuse to start as one of several processes of a launcher, except as the only one of a host."""
    if "launcher=slurm" in words:
        SlurmHosts.here()
    else:
        refuse_many_processes(are_hosts=any(word.startswith("launcher.hosts=") for word in words))


def run_other_host(words: tuple[str, ...]) -> int:
    """Run ranks for host 0 of a run over several hosts. This host gets no run folder. Returns host 0's exit code.

    Raises:
        CifarExpError: a setting is wrong, or host 0 cannot be reached.
    """
    from omegaconf import open_dict, read_write

    from cifar_exp.cli.hydra_app import composed, options_first
    from cifar_exp.config.hydra_versions import given_options
    from cifar_exp.runs.join_run import join_run

    given = given_options(options_first(words))

    def compose(overrides: Sequence[str]) -> "DictConfig":
        config = composed(overrides, given.get("config_dir"))
        with read_write(config), open_dict(config):
            del config["hydra"]
        return config

    return join_run(given["overrides"], compose)


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
    from omegaconf import OmegaConf

    from cifar_exp.runs.train_composed import train_composed

    plain: Any = OmegaConf.to_container(composed, resolve=False)
    are_hosts = plain["launcher"].get("hosts", 1) != 1
    refuse_many_processes(are_hosts=are_hosts)  # a Hydra launcher may have started this process
    return train_composed(composed, context).test_accuracy
