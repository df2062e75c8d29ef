"""`cifar-exp sync`: deliver to MLflow what runs hold on disk and their store lacks, after an outage or a crash."""

import click

from cifar_exp.cli.words import settings_in
from cifar_exp.errors import CifarExpError

SETTINGS = ("tracking.uri", "tracking.experiment")


@click.command("sync")
@click.argument("words", nargs=-1, required=True, metavar="RUN|SWEEP...")
def command(words: tuple[str, ...]) -> int:
    """Deliver to MLflow what runs hold on disk and their store lacks.

    RUN and SWEEP are a folder, an MLflow run id, or `latest` (the latest run). A folder may hold several runs, as
    outputs does. Sends the run, params, tags, metrics, files and final status. Each point is sent once. All runs are
    tried; the exit code is that of the first failure.

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
    settings = {name.partition(".")[2]: None if value == "null" else value for name, value in typed.items()}
    failures: list[CifarExpError] = []
    try:
        for word in folders:
            failures += deliver_all(find_runs(word, RUN_FILE, SWEEP_RUN_FILE), settings)
    except CifarExpError as error:
        failures.append(error)
    for failure in failures:
        print_notice(masked_text(str(failure)))
    return failures[0].exit_code if failures else 0
