"""`cifar-exp ui`: serve MLflow's pages for the runs, on this machine only."""

import os
import shlex
import socket
import sqlite3
import sys
from contextlib import suppress

import click

from cifar_exp.cli.words import settings_in
from cifar_exp.config.mlflow_settings import from_environment
from cifar_exp.errors import ConfigError
from cifar_exp.records.run_folder import OUTPUTS
from cifar_exp.system.import_path import safe_variables
from cifar_exp.system.printable import printable
from cifar_exp.system.redaction import masked_text
from cifar_exp.system.surroundings import set_up_environment
from cifar_exp.tracking.mlflow_store import MLFLOW_DEFAULTS
from cifar_exp.tracking.mlflow_tracker import MLflowTracker
from cifar_exp.tracking.own_store import foreign_place
from cifar_exp.tracking.store_address import follow_moved_store

HOST = "127.0.0.1"


@click.command("ui")
@click.argument("words", nargs=-1, metavar="[tracking.uri=ADDRESS]")
@click.option("--port", default=5000, show_default=True, help="Port on 127.0.0.1.")
def command(words: tuple[str, ...], port: int) -> None:
    """Serve MLflow's pages for the runs. Only this machine can reach them.

    tracking.uri=ADDRESS serves another store than that of MLFLOW_TRACKING_URI or, without it, the one under outputs/.
    """
    set_up_environment()
    typed, rest = settings_in(words, ["tracking.uri"])
    if rest:
        raise ConfigError(f"{rest[0]}: it must be a setting. Set tracking.uri=<address of the store>")
    address = store_address(typed.get("tracking.uri") or from_environment("uri"))
    check_port(port)
    print(f"http://{HOST}:{port} shows {masked_text(address)} in about 20 s; Ctrl-C ends it", flush=True)
    os.execve(sys.executable, [sys.executable, "-m", "mlflow", *server_arguments(port)], environment(address))


def store_address(uri: str | None) -> str:
    """The address of the store to serve.

    Args:
        uri: the address of a store; None for the default store.

    Raises:
        ConfigError: the store does not exist, is a server with its own pages, or keeps files outside its folder.
    """
    store = MLflowTracker(uri)
    address, database = store.address(), store.database()
    if address.startswith("http"):
        raise ConfigError(f"tracking.uri={uri}: that is a server with its own pages. Open it in a browser")
    if database and not database.exists():
        raise ConfigError(
            f"{database}: there is no such store yet. Run cifar-exp first, change to the folder that has outputs/, "
            f"or set tracking.uri=<address>"
        )
    if database:
        with suppress(sqlite3.Error):  # a store that is read-only or in use is served as it is
            follow_moved_store(database)
    if database and (place := foreign_place(database)):
        raise ConfigError(
            f"tracking.uri={masked_text(address)}: the store keeps files of runs at {printable(masked_text(place))}, "
            f"outside its folder, and the UI would show those files. If it is your store, run mlflow ui "
            f"--backend-store-uri {shlex.quote(masked_text(address))}"
        )
    return address


def check_port(port: int) -> None:
    """Check that the port is free.

    Raises:
        ConfigError: the port is in use or not allowed.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--port={port}: it cannot be used: {reason}. Set --port=<another one>") from error


def server_arguments(port: int) -> list[str]:
    """The arguments of ``mlflow``. ``--allowed-hosts`` refuses requests of other sites by DNS rebinding."""
    hosts = ",".join(f"{name}:{port}" for name in (HOST, "localhost"))
    artifacts = (OUTPUTS / "artifacts").resolve().as_uri()  # for runs that are tracked through this server
    listening = ["--host", HOST, "--port", str(port), "--allowed-hosts", hosts]
    # uvicorn searches the folder --app-dir first for modules, by default the current folder.
    options = ["--uvicorn-opts", f"--app-dir {os.devnull}"]
    return ["server", "--workers", "1", "--artifacts-destination", artifacts, *options, *listening]


def environment(address: str) -> dict[str, str]:
    """The server's environment. It holds the store's address: an argument would show its password to other users."""
    kept = {name: value for name, value in os.environ.items() if name != "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE"}
    settings = {"MLFLOW_BACKEND_STORE_URI": address, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return MLFLOW_DEFAULTS | kept | settings | safe_variables()
