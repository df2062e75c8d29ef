"""No secret is written or shown; only the user can read outputs; only this machine can reach MLflow's pages."""

import base64
import http.client
import os
import socket
import stat
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from cifar_exp import errors
from cifar_exp.data import download
from cifar_exp.records.run_folder import make_folder, make_job_private
from cifar_exp.system.redaction import is_secret, masked, masked_text
from tests.conftest import TINY, Command, the_run
from tests.helpers.cifar10_release import (
    Server,
    server,  # noqa: F401
)
from tests.helpers.servers import Relay, relay  # noqa: F401

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://me:pw@host:5000/path", "http://host:5000/path"),
        ("see postgresql+psycopg://me:p@w@host/db", "see postgresql+psycopg://host/db"),
        ("postgresql://me:pa/ss@host/db", "postgresql://host/db"),
        ("postgresql://user:p@ss/word@host/db", "postgresql://host/db"),
        ("postgresql://me@corp:pa/ss@host/db", "postgresql://host/db"),
        ("http://me:123@host/path", "http://host/path"),
        ("http://localhost:5000/x@y", "http://localhost:5000/x@y"),
        ("http://127.0.0.1:5000/x is away, write to a@b", "http://127.0.0.1:5000/x is away, write to a@b"),
        ("+data.auth=abc", "+data.auth=***"),
        ("Authorization: Bearer abc.def", "Authorization: ***"),
        ("Authorization: token abc.def", "Authorization: ***"),
        ("data.author=me model.signal=3", "data.author=me model.signal=3"),
        ("https://host/file?size=3&token=abc&x=1", "https://host/file?size=3&token=***&x=1"),
        ("+data.hf_token=abc def", "+data.hf_token=***"),
        ("data={root: x, api_key: abc}", "data={root: x, api_key: ***}"),
        ("seed=1 data.password='a b' x=2", "seed=1 data.password=*** x=2"),
        ('{"secret": "a b", "n": 1}', '{"secret": ***, "n": 1}'),
        ("model.num_tokens=64", "model.num_tokens=64"),
        ("data.root=/a/b@c", "data.root=/a/b@c"),
    ],
)
def test_secrets_are_masked_in_texts(text: str, expected: str) -> None:
    assert masked_text(text) == expected
    assert masked_text(expected) == expected


def test_secrets_are_masked_in_nested_settings() -> None:
    settings = {
        "data": {"authToken": "abc", "password": 1234, "root": "x", "use_token": True, "secret": None},
        "mirrors": ("http://a:b@c", 3, 0.5),
        "credentials": {"user": "me"},
    }
    assert masked(settings) == {
        "data": {"authToken": "***", "password": "***", "root": "x", "use_token": True, "secret": None},
        "mirrors": ["http://c", 3, 0.5],
        "credentials": "***",
    }
    named = ("token", "hf_token", "api-key", "API_KEY", "accessKey", "db.password", "passwd", "clientSecret")
    assert all(map(is_secret, named))
    assert not any(map(is_secret, ("num_tokens", "tokenizer", "secretary", "key", "keep", "monkey", "lr")))


def test_secrets_in_mlflow_variables_are_masked_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hush-token\n")  # as `cat` reads it; requests repeats it in its error
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "lr")
    assert masked_text("in header value: b'Bearer hush-token\\n', lr") == "in header value: b'Bearer ***\\n', lr"


def files_with(secret: bytes, folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]


def test_run_uses_secrets_and_writes_none(
    cifar_exp: Command,
    workplace: Path,
    relay: Relay,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A secret in each place where a user may put one; the dataset fails unless it gets the real values."""
    code = tmp_path_factory.mktemp("code")
    (code / "mine.py").write_text(
        "from cifar_exp.data.synthetic import synthetic\n"
        "def images(token: str, options: dict[str, str], mirror: str, **settings):\n"
        "    assert token == 'hush' + '-named' and options['password'] == 'hush' + '-deep', 'masked too early'\n"
        "    assert mirror == 'https://me:hush' + '-mirror@host/x?token=hush' + '-query', mirror\n"
        "    return synthetic(**settings)\n"
    )
    secrets = [
        *("data._target_=mine.images", "trusted_modules=[mine]", "+data.token=hush-named"),
        *("+data.options={password: hush-deep}", "+data.mirror='https://me:hush-mirror@host/x?token=hush-query'"),
        *(f"tracking.uri={relay.address.replace('//', '//me:hush-uri@')}", "tracking.experiment=secrets"),
    ]
    logs = ["hydra.output_subdir=.hydra", "hydra.verbose=true"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(code))
        run = cifar_exp(*TINY, *secrets, *logs, "train.epochs=1", "hydra.run.dir=run")
        assert run.returncode == 0, run.stderr
        assert "test accuracy" in run.stdout
        assert list((workplace / "run" / ".hydra").glob("*.yaml"))
        again = cifar_exp(*TINY, *secrets, *logs, "train.epochs=1", "resume=run")
        assert again.returncode == 0, again.stderr
        assert "finished before" in again.stdout
        sweep = cifar_exp("-m", *TINY, *secrets, "train.epochs=1", "seed=1", "optimizer.lr=0.1,-1")
        assert sweep.returncode == 2
        assert "optimizer.lr=-1" in sweep.stderr
        wrong = cifar_exp(*TINY, *secrets[:-2], "tracking.uri=ftp://me:hush-ftp@host")
        assert wrong.returncode == 2
    shown = [done.stdout + done.stderr for done in (run, again, sweep, wrong)]
    assert [text for text in shown if "hush" in text] == []
    assert files_with(b"hush", workplace) == []
    store = next(path for path in tmp_path_factory.getbasetemp().glob("server*"))
    assert files_with(b"hush", store) == []
    assert files_with(b"mine.images", store) != []  # the run is there, and is searched


def test_password_of_a_mirror_is_sent_only_to_it(tmp_path: Path, server: Server) -> None:  # noqa: F811
    """A redirect does not get it."""
    asked: list[tuple[str, str | None]] = []

    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(302)
            self.send_header("Location", target if self.path == "/other" else f"{own}/other")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    target = server.address
    with ThreadingHTTPServer(("127.0.0.1", 0), Redirecting) as redirecting:
        threading.Thread(target=redirecting.serve_forever, daemon=True).start()
        own = f"http://127.0.0.1:{redirecting.server_port}"
        with pytest.raises(errors.DataError) as caught:
            download.fetch_archive(tmp_path, mirror=f"{own.replace('//', '//me:p%40w@')}/x", archive=None)
        redirecting.shutdown()
    login = base64.b64encode(b"me:p@w").decode()
    assert asked == [("/x", f"Basic {login}"), ("/other", None)]
    assert "p%40w" not in masked_text(str(caught.value))


def modes(*folders: Path) -> list[str]:
    return [oct(folder.stat().st_mode & 0o777) for folder in folders]


@pytest.mark.usefixtures("no_store")
def test_outputs_are_private_and_other_files_keep_their_mode(cifar_exp: Command, workplace: Path) -> None:
    umask = os.umask(0o022)
    try:
        sweep = cifar_exp("-m", *TINY, "train.epochs=1", "seed=1", "progress=quiet")
        assert sweep.returncode == 0, sweep.stderr
        custom = cifar_exp(*TINY, "train.epochs=1", "hydra.run.dir=elsewhere/run", "progress=quiet", "tracking=none")
        assert custom.returncode == 0, custom.stderr
    finally:
        os.umask(umask)
    job = the_run(workplace)
    private = [workplace / "outputs", job.parent, job, workplace / "elsewhere" / "run"]
    assert modes(*private) == ["0o700"] * 4
    cache = next(workplace.rglob("train_images.npy"))
    assert modes(cache.parent) == ["0o755"]
    assert modes(workplace / "elsewhere") == ["0o755"]


def test_a_folder_that_was_there_before_keeps_its_mode(workplace: Path) -> None:
    """``outputs`` is a link to a folder that a group shares."""
    shared = workplace / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    (workplace / "outputs").symlink_to(shared)
    (shared / "made").mkdir(mode=0o755)
    umask = os.umask(0o002)
    try:
        for _ in range(2):
            make_folder(Path("outputs") / "day" / "run")
        make_folder(Path("outputs") / "made")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(shared.stat().st_mode) == 0o2775
    assert modes(shared / "day", shared / "day" / "run", shared / "made") == ["0o775", "0o700", "0o755"]

    job, old, own = (workplace / name for name in ("job", "old", "own"))
    for folder, file in ((job, "train.log"), (old, ".lock"), (own, "theirs.txt")):
        folder.mkdir(mode=0o755)
        (folder / file).touch()
        make_job_private(folder)
    assert modes(job, old, own) == ["0o700", "0o755", "0o755"]


def ask(port: int, host: str, path: str = "/ajax-api/2.0/mlflow/experiments/search?max_results=1") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Host": host})
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.usefixtures("no_store")
def test_mlflow_ui_listens_on_loopback_only(cifar_exp: Command, workplace: Path, mlflow_server: int) -> None:
    assert ask(mlflow_server, f"127.0.0.1:{mlflow_server}") == 200
    assert ask(mlflow_server, f"localhost:{mlflow_server}") == 200
    for foreign in ("evil.example", f"evil.example:{mlflow_server}", "10.0.0.1", f"127.0.0.1:{mlflow_server + 1}"):
        assert ask(mlflow_server, foreign) == 403
    listening = {
        connection.laddr.ip
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == mlflow_server
    }
    assert listening == {"127.0.0.1"}

    (workplace / "runs.db").write_text("")
    store = "tracking.uri=sqlite:///runs.db"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in (
            ([store, f"--port={port}"], f"--port={port}: it cannot be used: Address already in use. Set --port"),
            ([], "there is no such store yet. Run cifar-exp first"),
            (["tracking.uri=http://me:hush@host:1"], "tracking.uri=http://host:1: that is a server"),
            (["uri=x"], "uri=x: it must be a path that exists, or a setting. Set tracking.uri="),
            ([store, "--port=70000"], "--port=70000"),
        ):
            refused = cifar_exp("ui", *arguments)
            assert refused.returncode == 2
            assert message in refused.stderr
            assert "Traceback" not in refused.stderr
