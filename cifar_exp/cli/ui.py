"""``cifar-exp-ui``: MLflow's pages over the store of the runs, for this machine's user alone."""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_exp.errors import CifarExpError, ConfigError
from cifar_exp.records.run_folder import OUTPUTS
from cifar_exp.system.redaction import masked_text
from cifar_exp.system.surroundings import settle
from cifar_exp.tracking.mlflow_store import MLFLOW_DEFAULTS
from cifar_exp.tracking.mlflow_tracker import MLflowTracker

HOST = "127.0.0.1"


def main(arguments: Sequence[str] | None = None) -> None:
    """Become MLflow's server."""
    chosen = _parser().parse_args(arguments)
    try:
        settle()
        address = store(chosen.store)
        check_port(chosen.port)
    except CifarExpError as error:
        print(f"cifar-exp-ui: {masked_text(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"http://{HOST}:{chosen.port} shows {masked_text(address)} in some 20 s; Ctrl-C ends it", flush=True)
    os.execve(sys.executable, [sys.executable, "-m", "mlflow", *server_arguments(chosen.port)], environment(address))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cifar-exp-ui",
        description="Serve MLflow's pages over the runs' store. Nothing but this machine can reach them.",
    )
    parser.add_argument("--port", type=int, default=5000, help="where to listen on 127.0.0.1 (%(default)s)")
    parser.add_argument(
        "store", nargs="?", metavar="tracking.uri=ADDRESS", help="another store than the one under outputs/"
    )
    return parser


def store(word: str | None) -> str:
    """The address of the store to serve.

    Args:
        word: ``tracking.uri=<address>``, or None for the default store.

    Raises:
        ConfigError: where it is no such word, there is no such store, or it has pages of its own.
    """
    name, _, uri = (word or "tracking.uri=").partition("=")
    if name != "tracking.uri":
        raise ConfigError(f"{word}: it must be tracking.uri=<address of the store>")
    address = MLflowTracker(uri or None).address()
    if address.startswith("http"):
        raise ConfigError(f"tracking.uri={uri}: that is a server with pages of its own. Open it in a browser")
    database = address.partition("sqlite:///")[2].partition("?")[0]
    if database and not Path(database).exists():
        raise ConfigError(
            f"{database}: there is no such store yet. Type cifar-exp first, stand in the folder that holds outputs/, "
            f"or type tracking.uri=<address>"
        )
    return address


def check_port(port: int) -> None:
    """Raise a ConfigError where nothing can listen on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--port={port}: it cannot be had: {reason}. Type --port <another>") from error


def server_arguments(port: int) -> list[str]:
    """The words after ``mlflow``. Another site's page that makes its name point here sends that name: it is refused."""
    hosts = ",".join(f"{name}:{port}" for name in (HOST, "localhost"))
    artifacts = str((OUTPUTS / "artifacts").resolve())  # of runs that come in through this server
    listening = ["--host", HOST, "--port", str(port), "--allowed-hosts", hosts]
    return ["server", "--workers", "1", "--artifacts-destination", artifacts, *listening]


def environment(address: str) -> dict[str, str]:
    """The server's environment. The store is named here: an address may hold a password, and all can see arguments."""
    kept = {name: value for name, value in os.environ.items() if name != "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE"}
    settings = {"MLFLOW_BACKEND_STORE_URI": address, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return MLFLOW_DEFAULTS | kept | settings


if __name__ == "__main__":
    main()
