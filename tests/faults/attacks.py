"""Attacks: in files that a run reads, in names that it is given, over the network."""

import http.client
import time
from pathlib import Path

import psutil
import yaml

from tests.faults.images import picture
from tests.faults.mlflow_stores import free_port
from tests.faults.registry import case
from tests.faults.runs import EPOCHS_A_TRY, HERE, UNTRACKED, settings
from tests.faults.saving import copy_of_killed_run
from tests.faults.scene import LIMIT, Scene, check_exit

EXECUTES = "train: !!python/object/apply:os.mkdir [executed]\n"


@case("code in a run's config.yaml")
def malicious_yaml(scene: Scene) -> None:
    run = settings(EPOCHS_A_TRY)
    folder = copy_of_killed_run(scene, run, "run")
    (folder / "config.yaml").write_text(EXECUTES)
    check_exit(scene.run(*run, *HERE, *UNTRACKED), 8, "config.yaml")
    assert not (scene.folder / "executed").exists(), "code in config.yaml was run"
    scene.handled("code in a run's config.yaml", "the same")


@case("a target in a run's config.yaml")
def malicious_target(scene: Scene) -> None:
    """Prediction with a foreign run imports only what its user trusts, whatever the run's config trusts."""
    folder = copy_of_killed_run(scene, settings(EPOCHS_A_TRY), "run")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["trusted_modules"] = ["os", "posix", "tests"]
    picture().save(scene.folder / "picture.png")
    # Prediction builds the network only, so it ignores the target in `augment`.
    for section, code, words in (("augment", 0, ()), ("model", 2, ("model._target_=os.mkdir",))):
        changed = config | {section: {"_target_": "os.mkdir", "path": "executed"}}
        (folder / "config.yaml").write_text(yaml.safe_dump(changed))
        check_exit(scene.run("predict", "run", "trusted_modules=[tests]", "picture.png"), code, *words)
    assert not (scene.folder / "executed").exists(), "code that a run's folder names was run"
    scene.handled("a target in a run's config.yaml", "the same")


@case("a password in the tracker's address")
def password(scene: Scene) -> None:
    """The password is in no file of the run and in no output."""
    address = f"http://somebody:hunter2@127.0.0.1:{free_port()}"
    ended = scene.run(*settings(1), *HERE, f"tracking.uri={address}", env={"no_proxy": "127.0.0.1"})
    check_exit(ended, 5)
    assert "hunter2" not in ended.out + ended.err
    leaks = [str(path) for path in scene.folder.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert not leaks, f"the password is in {leaks}"
    scene.handled("a password in the tracker's address", "the same")


@case("another Host header", "another machine's request to the UI", "the UI's port is taken", needs=("ui", "linux"))
def host_header(scene: Scene) -> None:
    """DNS rebinding gets no answer, and other machines cannot connect."""
    check_exit(scene.run(*settings(1), *HERE), 0)
    port = free_port()
    running = scene.start("ui", "--port", str(port))
    deadline = time.monotonic() + LIMIT
    while (answer := status(port, f"127.0.0.1:{port}")) is None:
        assert time.monotonic() < deadline, running.err
        assert running.process.poll() is None, running.err
        time.sleep(0.5)
    assert answer == 200
    refused = status(port, "evil.example")
    assert refused is not None
    assert 400 <= refused < 500, f"a request for evil.example is answered {refused}"
    scene.handled("another Host header", f"answered {refused}")
    process = psutil.Process(running.process.pid)
    family = [process, *process.children(recursive=True)]
    listening = {c.laddr.ip for member in family for c in member.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}, listening
    scene.handled("another machine's request to the UI", "it listens on 127.0.0.1 alone")
    second = scene.run("ui", "--port", str(port), tmp=_folder(scene))
    assert second.code not in (0, 1), second
    check_exit(second, second.code, str(port))
    scene.handled("the UI's port is taken", "the same")
    running.signal(15, group=True)
    running.process.wait(60)


def _folder(scene: Scene) -> Path:
    folder = scene.base / "tmp-second"
    folder.mkdir()
    return folder


def status(port: int, host: str) -> int | None:
    """The HTTP status that the server at ``port`` answers for ``host``, or None."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/", headers={"Host": host})
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()
