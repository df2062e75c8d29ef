"""Servers that answer slowly, ask for a login, redirect or are not MLflow: each call ends with a remedy."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cifar_exp.records.journal import RUN_ID_FILE
from cifar_exp.records.run_folder import RunInfo
from cifar_exp.tracking import bounded_client
from cifar_exp.tracking.follower import undelivered_message
from cifar_exp.tracking.mlflow_tracker import MLflowTracker
from cifar_exp.tracking.store_problems import LOGIN, OTHER_SERVER, is_permanent

PAGE = "<html>Log in</html>"
LATER = "Once the tracker can be reached"


class Odd(BaseHTTPRequestHandler):
    """A server that gives the same answer to each request."""

    status, body, location = 200, "", ""
    drips = False

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(self.status)
        for name, value in {"Retry-After": "3600", "Location": self.location}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "9999" if self.drips else str(len(self.body)))
        self.end_headers()
        try:
            self.wfile.write(self.body.encode())
            while self.drips:
                self.wfile.write(b" ")
                time.sleep(0.1)
        except OSError:
            return

    do_GET = do_POST = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Odd], str]]:
    """The server class, to set its answer, and its address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    answers = type("Answers", (Odd,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), answers) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield answers, f"http://127.0.0.1:{server.server_port}"
        answers.drips = False
        server.shutdown()


def failure(tmp_path: Path, address: str) -> Exception:
    run = RunInfo("a run", tmp_path, {}, {}, time.time())
    with pytest.raises(Exception, match=r".") as caught:
        MLflowTracker(address).sink(run).open()
    assert not (tmp_path / RUN_ID_FILE).exists()
    assert isinstance(caught.value, Exception)
    return caught.value


@pytest.mark.parametrize(
    ("status", "body", "remedy", "final"),
    [
        (200, PAGE, OTHER_SERVER, False),
        (200, "", OTHER_SERVER, False),
        (200, '{"hello": 1}', OTHER_SERVER, False),
        (200, '{"experiment": {"experiment_id": 5}}', OTHER_SERVER, False),
        (404, PAGE, OTHER_SERVER, False),
        (404, '{"detail": "Not Found"}', OTHER_SERVER, False),
        (401, "You are not authenticated", LOGIN, True),
        (403, '{"error_code": "PERMISSION_DENIED", "message": "no"}', LOGIN, True),
        (302, "", OTHER_SERVER, False),  # a redirect to itself
        (429, "slow", LATER, False),
        (500, "x", LATER, False),
        (503, "x", LATER, False),
    ],
)
def test_message_of_each_server_error_has_a_remedy(
    tmp_path: Path, odd: tuple[type[Odd], str], status: int, body: str, remedy: str, final: bool
) -> None:
    answers, address = odd
    answers.status, answers.body, answers.location = status, body, f"{address}/again"
    error = failure(tmp_path, f"{address}/")
    assert is_permanent(error) is final
    message = undelivered_message(error, tmp_path)
    assert remedy in message
    assert (LATER in message) == (remedy == LATER)


def test_slow_answer_times_out(tmp_path: Path, odd: tuple[type[Odd], str], monkeypatch: pytest.MonkeyPatch) -> None:
    answers, address = odd
    answers.drips = True
    monkeypatch.setattr(bounded_client, "_limit", lambda *_: 0.3)
    for _ in range(bounded_client.MOST_HANGING + 1):
        assert isinstance(failure(tmp_path, address), bounded_client.NoAnswerError)
        assert len(bounded_client._hanging) <= bounded_client.MOST_HANGING


def test_large_upload_has_a_longer_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_TIMEOUT", raising=False)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(5_000_000))
    assert bounded_client._limit("log_artifact", ("id", str(file))) == 160
    assert bounded_client._limit("get_run", ("id",)) == 60
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "300")
    assert bounded_client._limit("get_run", ("id",)) == 600
