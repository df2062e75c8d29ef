"""A real MLflow server behind a relay that can close connections, hang, or drop answers."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

Mode = Literal["pass", "cut", "hang", "deaf"]
REPO = Path(__file__).resolve().parents[2]


class Relay:
    """Passes connections on to a server on this machine.

    Attributes:
        mode: ``pass``; ``cut`` closes every connection; ``hang`` takes requests and never answers; ``deaf`` passes them
            on and loses the answers.
    """

    def __init__(self, server_port: int) -> None:
        self.mode: Mode = "pass"
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def turn(self, mode: Mode) -> None:
        """Switch the mode; every mode but ``hang`` closes open connections."""
        self.mode = mode
        if mode != "hang":
            for connection in self._open:
                connection.close()
            self._open.clear()

    def close(self) -> None:
        self._listener.close()
        self.turn("cut")

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.mode == "cut":
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._server_port))
            self._open += [client, server]
            host = self.address.removeprefix("http://").encode()
            for source, target, old, new in (
                (client, server, b"Host: " + host, b"Host: 127.0.0.1:%d" % self._server_port),
                (server, client, b"", b""),
            ):
                threading.Thread(target=self._pump, args=(source, target, old, new), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, old: bytes, new: bytes) -> None:
        try:
            while data := source.recv(2**16):
                is_answer = not old
                if self.mode == "hang":
                    return  # without closing anything
                if self.mode == "deaf" and is_answer:
                    break
                target.sendall(data.replace(old, new) if old else data)
        except OSError:
            pass
        for end in (source, target):
            end.close()


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Start ``cifar-exp ui`` with a new store. Returns the port."""
    from cifar_exp.tracking.mlflow_tracker import MLflowTracker

    folder = tmp_path_factory.mktemp("server")
    uri = f"sqlite:///{folder / 'runs.db'}"
    MLflowTracker(uri, "made first").client()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar_exp", "ui", f"--port={port}", f"tracking.uri={uri}"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_until_up(process, port)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:  # it waits for a connection that a test has left hanging
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_up(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + 200
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.3)


@pytest.fixture
def relay(mlflow_server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    """A relay before the MLflow server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Relay(mlflow_server)
    yield made
    made.close()
