"""`cifar-exp sync`: deliver to MLflow what runs hold on disk and a store lacks: their own, or one that is named."""

from collections.abc import Mapping

import click

from cifar_exp.cli.words import settings_in
from cifar_exp.errors import CifarExpError, ConfigError

SETTINGS = ("tracking.uri", "tracking.experiment")


@click.command("sync")
@click.argument("words", nargs=-1, metavar="RUN|SWEEP...")
@click.option("--to", metavar="ADDRESS", help="Copy the runs to this store, such as the server of a team.")
def command(words: tuple[str, ...], to: str | None) -> int:
    """Deliver to MLflow what runs hold on disk and their store lacks.

    RUN and SWEEP are a folder, an MLflow run id, or `latest` (the latest run). A folder may hold several runs, as
    outputs does. Sends the run, params, tags, metrics, files and final status. Each point is sent once. All runs are
    tried; the exit code is that of the first failure.

    With --to, runs that were made offline are copied to another store, by default all runs in outputs. They keep their
    own store. A sweep keeps its parent run. What was copied before is not copied again.

    \b
    tracking.uri=<address>      another MLflow store, or the run's own with its password (run folders never keep it)
    tracking.experiment=<name>  another experiment
    """
    from cifar_exp.records.find_run import find_runs
    from cifar_exp.records.run_folder import RUN_FILE, SWEEP_RUN_FILE
    from cifar_exp.system.printable import print_notice
    from cifar_exp.system.redaction import masked_text
    from cifar_exp.system.surroundings import set_up_environment
    from cifar_exp.tracking.deliveries import deliver_all

    set_up_environment()
    typed, folders = settings_in(words, SETTINGS)
    folders = with_all_runs(folders, to, typed)
    settings = {name.partition(".")[2]: None if value == "null" else value for name, value in typed.items()}
    failures: list[CifarExpError] = []
    try:
        for word in folders:
            failures += deliver_all(find_runs(word, RUN_FILE, SWEEP_RUN_FILE), settings, to)
    except CifarExpError as error:
        failures.append(error)
    for failure in failures:
        print_notice(masked_text(str(failure)))
    return failures[0].exit_code if failures else 0


def with_all_runs(folders: list[str], to: str | None, typed: Mapping[str, str]) -> list[str]:
    """The typed runs and sweeps; with ``--to``, all runs if none is typed.

    Raises:
        ConfigError: none is typed without ``--to``; or the store to copy to is no address, or is named twice.
    """
    from cifar_exp.config.mlflow_settings import checked_address
    from cifar_exp.records.run_folder import OUTPUTS

    if to is None:
        if not folders:
            raise ConfigError("the run or sweep is missing. Set it to latest, an MLflow run id or a folder")
        return folders
    checked_address(to, "--to")
    if "tracking.uri" in typed:
        raise ConfigError(f"--to={to}: tracking.uri={typed['tracking.uri']} names another store. Leave one of them out")
    return folders or [str(OUTPUTS)]
