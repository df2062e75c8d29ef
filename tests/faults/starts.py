"""Simultaneous starts, unusual environments, a changing clock, a machine with too few resources."""

import os
import signal
import socket
import time

from cifar_exp.records import journal
from tests.conftest import environment
from tests.faults.registry import case, faketime
from tests.faults.runs import HERE, UNTRACKED, assert_recorded_once, assert_same_as_uninterrupted, settings, statuses
from tests.faults.scene import Scene, check_exit


@case("two starts in one second", racy=True)
def two_starts(scene: Scene) -> None:
    """Each has its own folder. The first two create the store at the same time."""
    run = settings(2)
    for number in range(scene.times):
        tmps = [scene.base / f"tmp-{number}-{side}" for side in (0, 1)]
        for tmp in tmps:
            tmp.mkdir()
        for running in [scene.start(*run, tmp=tmp) for tmp in tmps]:
            check_exit(running.wait(), 0)
        folders = sorted(path.parent.relative_to(scene.folder) for path in scene.folder.rglob("run.json"))
        assert len(folders) == 2 * (number + 1), folders
        assert statuses(scene) == ["FINISHED"] * len(folders)
        scene.handled("two starts in one second", "none needed: both train, each in its own folder")
    for folder in folders:
        assert_recorded_once(scene, str(folder))
        assert_same_as_uninterrupted(scene, run, str(folder))


@case("two starts in one folder", racy=True)
def two_starts_in_one_folder(scene: Scene) -> None:
    run = settings(2)
    for number in range(scene.times):
        here = f"hydra.run.dir=run-{number}"
        tmps = [scene.base / f"tmp-{number}-{side}" for side in (0, 1)]
        for tmp in tmps:
            tmp.mkdir()
        both = [running.wait() for running in [scene.start(*run, *UNTRACKED, here, tmp=tmp) for tmp in tmps]]
        trained, refused = sorted(both, key=lambda ended: ended.code)
        check_exit(trained, 0)
        check_exit(refused, 2, f"run-{number}", "Set" if "has a run already" in refused.err else "Wait")
        assert_same_as_uninterrupted(scene, run, f"run-{number}")
        scene.handled("two starts in one folder", "one trains, the other is refused")


@case("two starts resume one run")
def two_resume(scene: Scene) -> None:
    run = settings(40)
    running = scene.start(*run, *UNTRACKED, "hydra.run.dir=outputs/cut", plan={"pace": 0.01})
    running.until_training(scene.journal("outputs/cut"), lines=20)
    running.signal(signal.SIGKILL)
    running.wait()
    tmps = [scene.base / f"tmp-{side}" for side in (0, 1)]
    for tmp in tmps:
        tmp.mkdir()
    both = [scene.start(*run, *UNTRACKED, "resume=auto", "progress=lines", tmp=tmp) for tmp in tmps]
    ended = [one.wait() for one in both]
    for one in ended:
        check_exit(one, 0)
    assert sum("outputs/cut continues" in one.out for one in ended) == 1, [one.out for one in ended]
    for record in scene.folder.rglob("run.json"):
        assert_same_as_uninterrupted(scene, run, str(record.parent.relative_to(scene.folder)))
    scene.handled("two starts resume one run", "one resumes it, the other starts again")


@case("ports are taken")
def port_taken(scene: Scene) -> None:
    """The default ports of torch's launchers and the port in the environment are taken."""
    run = settings(2)
    taken = [socket.create_server(("127.0.0.1", port)) for port in (29400, 29500) if _is_free(port)]
    try:
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        check_exit(scene.run(*run, *HERE, *UNTRACKED, env=env), 0)
    finally:
        for listener in taken:
            listener.close()
    assert_same_as_uninterrupted(scene, run)
    scene.handled("ports are taken", "none needed: no port is used")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@case("one of several processes of a launcher", "another launcher's environment")
def other_launcher(scene: Scene) -> None:
    run = settings(2)
    env = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "1"}
    check_exit(scene.run(*run, *HERE, *UNTRACKED, env=env), 2, "WORLD_SIZE=8", "devices.count=8")
    assert not (scene.folder / "run").exists()
    scene.handled("one of several processes of a launcher", "the same")
    del env["WORLD_SIZE"]
    check_exit(scene.run(*run, *HERE, *UNTRACKED, env=env | {"OMP_NUM_THREADS": "many"}), 0)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("another launcher's environment", "none needed: it is ignored")


SLEEP = """
import select, time
time.sleep = lambda seconds: select.select([], [], [], seconds) and None
"""


def fake_clock(scene: Scene) -> dict[str, str]:
    """Environment variables that make libfaketime change a command's wall clock.

    Python's `time.sleep` waits for a time of the monotonic clock, which libfaketime 0.9.10 refuses: it is replaced.
    """
    site = scene.base / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SLEEP)
    path = os.pathsep.join([str(site), environment()["PYTHONPATH"]])
    return {"LD_PRELOAD": str(faketime()), "FAKETIME_DONT_FAKE_MONOTONIC": "1", "PYTHONPATH": path}


@case("the clock jumps ahead by a day", "the clock jumps back by a day", needs=("faketime",))
def clock_moves(scene: Scene) -> None:
    """The clock jumps during training. Times in the journal still increase, and the total is the elapsed time."""
    for number, (fault, offset) in enumerate(
        {"the clock jumps ahead by a day": "+1d", "the clock jumps back by a day": "-1d"}.items()
    ):
        run_dir = f"run-{number}"
        clock = scene.base / f"clock-{number}"
        clock.write_text("+0d\n")
        env = fake_clock(scene) | {"FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_CACHE_DURATION": "1"}
        run = settings(150)
        began = time.monotonic()
        running = scene.start(*run, f"hydra.run.dir={run_dir}", env=env, plan={"pace": 0.01})
        running.until_training(scene.journal(run_dir), lines=100)
        clock.write_text(f"{offset}\n")
        check_exit(running.wait(), 0)
        passed = time.monotonic() - began
        entries = journal.read(scene.folder / run_dir)
        times = [entry.time for entry in entries]
        assert times == sorted(times), "times in the journal go back"
        total = journal.last_values(scene.folder / run_dir)["time/total_seconds"]
        assert 0 < total < passed + 60, f"the run took {passed:.0f} s and says {total:.0f} s"
        assert_recorded_once(scene, run_dir)
        assert_same_as_uninterrupted(scene, run, run_dir)
        scene.handled(fault, "none needed: it trains to the end")
    assert statuses(scene) == ["FINISHED"] * 2


@case("a resume while the clock is a day behind", needs=("faketime", "linux"))
def clock_went_back(scene: Scene) -> None:
    run = settings(40)
    running = scene.start(*run, *HERE, plan={"pace": 0.01})
    running.until_training(scene.journal(), lines=20)
    running.signal(signal.SIGKILL)
    running.wait()
    env = fake_clock(scene) | {"FAKETIME": "-1d"}
    check_exit(scene.run(*run, *HERE, env=env), 0)
    times = [entry.time for entry in journal.read(scene.folder / "run")]
    assert times == sorted(times), "times in the journal go back"
    assert statuses(scene) == ["FINISHED"]
    assert_recorded_once(scene)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("a resume while the clock is a day behind", "resumes, bit for bit")


@case("standard output is closed", needs=("linux",))
def output_closed(scene: Scene) -> None:
    """``cifar-exp | head -n 1`` trains to the end."""
    run = settings(4)
    piped = ["bash", "-c", 'set -o pipefail; "$@" | head -n 1 >/dev/null', "bash"]
    ended = scene.run(*run, *HERE, "progress=lines", before=piped)
    check_exit(ended, 0)
    assert statuses(scene) == ["FINISHED"]
    assert_recorded_once(scene)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("standard output is closed", "none needed: it trains to the end")


@case("standard output is full", needs=("linux",))
def output_full(scene: Scene) -> None:
    run = settings(4)
    check_exit(scene.run(*run, *HERE, "progress=lines", before=["bash", "-c", 'exec "$@" >/dev/full', "bash"]), 0)
    assert statuses(scene) == ["FINISHED"]
    assert_same_as_uninterrupted(scene, run)
    scene.handled("standard output is full", "none needed: it trains to the end")


CPU = "devices.oversubscribe=false"
REFUSED = {
    "too many devices": (("devices.count=1000", CPU), 4, "devices.count=1000"),
    "too many threads": (("devices.count=1", "devices.threads=999", CPU), 4, "devices.threads=999"),
    "a batch that ranks cannot divide": (
        ("train.scaling=strong", "train.batch_size=7"),
        2,
        "train.batch_size=8",
    ),
    "a batch larger than the training set": (("train.batch_size=4096",), 2, "train.batch_size=4096"),
    "more steps than the maximum": (("train.epochs=999999999999",), 2, "train.epochs=999999999999"),
    "images too small for the network": (("train.image_scales=[0.01]",), 2, "train.image_scales"),
    "optimizer settings that exclude each other": (("+optimizer.nesterov=true", "optimizer.momentum=0"), 2, "Nesterov"),
    "a target that is not trusted": (("model._target_=os.system",), 2, "trusted_modules=[os]"),
    "a target behind a trusted module": (("model._target_=torch.hub.os.system",), 2, "model._target_"),
}


@case(*REFUSED)
def refused(scene: Scene) -> None:
    """Commands that are refused before training."""
    for fault, (overrides, code, word) in REFUSED.items():
        check_exit(scene.run(*settings(2), *overrides, *UNTRACKED), code, word)
        assert not list(scene.folder.rglob("metrics.jsonl")), "something was trained"
        scene.handled(fault, "the same")


@case("GPUs on a machine without any", needs=("no gpu",))
def no_gpus(scene: Scene) -> None:
    check_exit(scene.run(*settings(2), "devices.accelerator=gpu", *UNTRACKED), 4, "found 0", "Set devices=cpu")
    scene.handled("GPUs on a machine without any", "the same")
