"""Processes that die, hang or are told to stop, at any moment."""

import signal
import time
from collections.abc import Callable

from tests.faults.registry import case
from tests.faults.runs import (
    EPOCHS_A_TRY,
    HERE,
    UNTRACKED,
    assert_recorded_once,
    assert_same_as_uninterrupted,
    ends,
    settings,
    statuses,
    trains,
)
from tests.faults.scene import Running, Scene, says

GOES_ON = "goes on, bit for bit"
PACE = {"pace": 0.05}  # seconds a step, so that there is time to hit it


def chain(
    scene: Scene, fault: str, strike: Callable[[Running], None], code: int, *words: str, status: str = "FAILED"
) -> None:
    """One run that is hit ``scene.times`` times at random moments and goes on each time, then comes to its end.

    In the end it has the weights of the run that was never hit, and MLflow every point once.
    """
    run = settings(EPOCHS_A_TRY * scene.times)
    for _ in range(scene.times):
        running = scene.start(*run, *HERE, plan=PACE)
        running.until_training(scene.journal(), lines=1 + scene.random.randrange(EPOCHS_A_TRY * 3))
        strike(running)
        if status == "RUNNING":
            says(running.wait(), code)
            assert statuses(scene) in ([], ["RUNNING"])  # killed before or after it was recorded
        else:
            ends(scene, running.wait(), code, status, *words)
        scene.handled(fault, GOES_ON)
    ends(scene, scene.run(*run, *HERE), 0, "FINISHED")
    assert_recorded_once(scene)
    assert_same_as_uninterrupted(scene, run)


@case("SIGKILL of rank 0", racy=True, needs=("linux",))
def rank_0_killed(scene: Scene) -> None:
    chain(scene, "SIGKILL of rank 0", lambda run: run.ranks()[0].kill(), 7, "rank 0", "SIGKILL")


@case("SIGKILL of rank 1", racy=True, needs=("linux",))
def rank_1_killed(scene: Scene) -> None:
    chain(scene, "SIGKILL of rank 1", lambda run: run.ranks()[1].kill(), 7, "rank 1", "SIGKILL")


@case("SIGKILL of all ranks at once", racy=True, needs=("linux",))
def all_ranks_killed(scene: Scene) -> None:
    def strike(running: Running) -> None:
        for rank in running.ranks():
            rank.kill()

    chain(scene, "SIGKILL of all ranks at once", strike, 7, "SIGKILL")


@case("SIGKILL of the fork server", racy=True, needs=("linux",))
def nursery_killed(scene: Scene) -> None:
    def strike(running: Running) -> None:
        nursery = running.nursery()
        assert nursery
        nursery.kill()

    chain(scene, "SIGKILL of the fork server", strike, 7)


@case("SIGTERM of the parent", racy=True, needs=("linux",))
def parent_terminated(scene: Scene) -> None:
    chain(scene, "SIGTERM of the parent", lambda run: run.signal(signal.SIGTERM), 143, status="KILLED")


@case("Ctrl-C in training", racy=True, needs=("linux",))
def interrupted(scene: Scene) -> None:
    """As a terminal does it: every process of the group gets the signal."""
    chain(scene, "Ctrl-C in training", lambda run: run.signal(signal.SIGINT, group=True), 130, status="KILLED")


@case("the terminal is closed (SIGHUP)", racy=True, needs=("linux",))
def terminal_closed(scene: Scene) -> None:
    chain(
        scene,
        "the terminal is closed (SIGHUP)",
        lambda run: run.signal(signal.SIGHUP, group=True),
        129,
        status="KILLED",
    )


@case("the terminal is closed under nohup", needs=("linux",))
def terminal_closed_under_nohup(scene: Scene) -> None:
    run = settings(EPOCHS_A_TRY)
    running = scene.start(*run, *HERE, plan=PACE, before=["nohup"])
    running.until_training(scene.journal(), lines=10)
    running.signal(signal.SIGHUP, group=True)
    ends(scene, running.wait(), 0, "FINISHED")
    assert_same_as_uninterrupted(scene, run)
    scene.handled("the terminal is closed under nohup", "none needed: it trains to the end")


@case("SIGTERM of the parent while a rank is stopped", needs=("linux",))
def parent_terminated_beside_a_stopped_rank(scene: Scene) -> None:
    """The rank can answer no signal but SIGKILL; elastic alone would wait half a minute for it."""
    run = settings(EPOCHS_A_TRY)
    running = scene.start(*run, *HERE, plan=PACE)
    running.until_training(scene.journal(), lines=10)
    running.ranks()[1].suspend()
    running.signal(signal.SIGTERM)
    ended = running.wait(25)
    says(ended, 143)
    assert statuses(scene) == ["KILLED"] or "cifar-exp sync" in ended.err  # the ranks have taken most of the time
    says(scene.run(*run, *HERE), 0)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("SIGTERM of the parent while a rank is stopped", GOES_ON)


@case("SIGKILL of the parent", racy=True, needs=("linux",))
def parent_killed(scene: Scene) -> None:
    """It can tell nobody: the run stays RUNNING until the next start, which goes on with it."""
    chain(scene, "SIGKILL of the parent", lambda run: run.signal(signal.SIGKILL), -signal.SIGKILL, status="RUNNING")


@case("SIGTERM twice", racy=True, needs=("linux",))
def terminated_twice(scene: Scene) -> None:
    def strike(running: Running) -> None:
        running.signal(signal.SIGTERM)
        time.sleep(scene.random.uniform(0, 0.5))
        if running.process.poll() is None:
            running.signal(signal.SIGTERM)

    chain(scene, "SIGTERM twice", strike, 143, status="KILLED")


def once(scene: Scene, fault: str, plan: dict[str, object], code: int, *words: str, traceback: bool = False) -> None:
    """A fault at a step of the rank's own choosing, then a start without it that goes on."""
    run = settings(EPOCHS_A_TRY)
    hit = scene.run(*run, *HERE, plan=plan)
    ends(scene, hit, code, "FAILED", *words, traceback=traceback)
    ends(scene, scene.run(*run, *HERE), 0, "FINISHED")
    assert_recorded_once(scene)
    assert_same_as_uninterrupted(scene, run)
    scene.handled(fault, GOES_ON)


def at(scene: Scene, do: str, rank: int = 1) -> dict[str, object]:
    """A plan for some step after the first two epochs."""
    return {"point": "train", "rank": rank, "number": scene.random.randrange(14, 46), "do": do}


@case("os._exit(0) in a rank", quick=True)
def rank_left(scene: Scene) -> None:
    once(scene, "os._exit(0) in a rank", at(scene, "exit"), 7, "rank 1")


@case("os._exit(0) in rank 0")
def rank_0_left(scene: Scene) -> None:
    once(scene, "os._exit(0) in rank 0", at(scene, "exit", 0), 7, "rank 0")


@case("os._exit(0) in the only rank")
def only_rank_left(scene: Scene) -> None:
    run = settings(EPOCHS_A_TRY, "devices.count=1")
    ends(scene, scene.run(*run, *HERE, plan=at(scene, "exit", 0)), 7, "FAILED", "rank 0")
    ends(scene, scene.run(*run, *HERE), 0, "FINISHED")
    assert_same_as_uninterrupted(scene, run)
    scene.handled("os._exit(0) in the only rank", GOES_ON)


@case("segmentation fault in a rank")
def rank_segfaults(scene: Scene) -> None:
    once(scene, "segmentation fault in a rank", at(scene, "segfault"), 7, "rank 1", "SIGSEGV")


@case("abort in a rank")
def rank_aborts(scene: Scene) -> None:
    once(scene, "abort in a rank", at(scene, "abort"), 7, "rank 1", "SIGABRT")


@case("exception in a rank")
def rank_raises(scene: Scene) -> None:
    words = ("rank 1 failed", "the flux capacitor is empty")
    once(scene, "exception in a rank", at(scene, "raise"), 7, *words, traceback=True)


@case("memory error in a rank")
def rank_without_memory(scene: Scene) -> None:
    once(scene, "memory error in a rank", at(scene, "memory"), 7, "rank 1", "MemoryError", traceback=True)


@case("NaN at step k")
def not_a_number(scene: Scene) -> None:
    once(scene, "NaN at step k", at(scene, "nan"), 6, "the loss is nan by step", "optimizer.lr")


@case("infinity at step k on one rank")
def infinite(scene: Scene) -> None:
    once(scene, "infinity at step k on one rank", at(scene, "inf"), 6, "the loss is", "by step")


@case("NaN in evaluation")
def not_a_number_in_evaluation(scene: Scene) -> None:
    plan = {"point": "evaluation", "rank": 0, "number": 4, "do": "nan"}
    once(scene, "NaN in evaluation", plan, 6, "the loss is nan")


LIMITED = ("launcher.timeout=8",)  # seconds that a rank may hang


@case("SIGSTOP of a rank", racy=True, needs=("linux", "watchdog"))
def rank_stopped(scene: Scene) -> None:
    """The stopped rank is named with its step, and ended though it can answer no signal but SIGKILL."""
    run = settings(EPOCHS_A_TRY * (scene.times + 1), *LIMITED)
    for _ in range(scene.times):
        running = scene.start(*run, *HERE, plan=PACE)
        running.until_training(scene.journal(), lines=1 + scene.random.randrange(EPOCHS_A_TRY * 3))
        rank = scene.random.randrange(2)
        running.ranks()[rank].suspend()
        ended = running.wait()
        says(ended, 7, f"rank {rank}", "step", "launcher.timeout")
        assert statuses(scene) == ["FAILED"]
        scene.handled("SIGSTOP of a rank", GOES_ON)
    says(scene.run(*run, *HERE), 0)
    assert_same_as_uninterrupted(scene, run)


@case("a rank hangs", needs=("watchdog",))
def rank_hangs(scene: Scene) -> None:
    run = settings(EPOCHS_A_TRY, *LIMITED)
    says(scene.run(*run, *HERE, plan=at(scene, "hang")), 7, "rank 1", "step", "launcher.timeout")
    says(scene.run(*run, *HERE), 0)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("a rank hangs", GOES_ON)


@case("SIGKILL of a rank that is replaced", racy=True, needs=("linux", "restarts"))
def rank_replaced(scene: Scene) -> None:
    """``launcher.max_restarts``: one command, which goes on by itself from the last checkpoint each time."""
    run = settings(EPOCHS_A_TRY * (scene.times + 1), f"launcher.max_restarts={scene.times}")
    running = scene.start(*run, *HERE, plan=PACE)
    for _ in range(scene.times):
        running.until_training(scene.journal(), lines=10 + scene.random.randrange(EPOCHS_A_TRY * 3))
        before = {rank.pid for rank in running.ranks()}
        running.ranks()[scene.random.randrange(2)].kill()
        running.until(
            lambda before=before: len(new := {rank.pid for rank in running.ranks()}) == 2 and not new & before,
            "its replacement",
        )
        scene.handled("SIGKILL of a rank that is replaced", "none needed: it went on by itself, bit for bit")
    ended = running.wait()
    assert ended.code == 0, ended.err
    assert statuses(scene) == ["FINISHED"]
    assert_recorded_once(scene)
    assert_same_as_uninterrupted(scene, run)


@case("ranks die more often than launcher.max_restarts", needs=("linux", "restarts"))
def rank_dies_again(scene: Scene) -> None:
    run = settings(EPOCHS_A_TRY, "launcher.max_restarts=1")
    plan = {"point": "train", "rank": 1, "number": 9, "do": "kill"}  # of every process that is rank 1
    says(scene.run(*run, *HERE, plan=plan), 7, "rank 1", "SIGKILL")
    assert statuses(scene) == ["FAILED"]
    says(scene.run(*run, *HERE), 0)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("ranks die more often than launcher.max_restarts", GOES_ON)


def interrupt_at(
    scene: Scene,
    fault: str,
    reach: Callable[[Running], None],
    plan: dict[str, object] | None = None,
    number: int = signal.SIGINT,
) -> None:
    """A signal to all at a certain place: one line, KILLED where it was recorded; the next start trains it."""
    run = settings(EPOCHS_A_TRY)
    for tried in range(scene.times):
        here = (f"hydra.run.dir=run-{tried}", "resume=auto")
        running = scene.start(*run, *here, plan=plan)
        reach(running)
        running.signal(number, group=True)
        says(running.wait(), 128 + number)
        assert set(statuses(scene)) <= {"KILLED", "FINISHED"}, statuses(scene)
        if tried == 0 or scene.random.random() < 0.1:  # the next start is the same every time
            says(scene.run(*run, *here), 0)
            assert_same_as_uninterrupted(scene, run, f"run-{tried}")
        scene.handled(fault, "trains it to the end")


@case("Ctrl-C in compose", racy=True, needs=("linux",))
def interrupted_in_compose(scene: Scene) -> None:
    def reach(running: Running) -> None:
        running.until_it_answers_signals()
        time.sleep(scene.random.uniform(0, 0.5))

    interrupt_at(scene, "Ctrl-C in compose", reach)


@case("Ctrl-C while it starts", racy=True, needs=("linux",))
def interrupted_at_start(scene: Scene) -> None:
    def reach(running: Running) -> None:
        running.until_it_answers_signals()
        moment, journals = time.monotonic() + scene.random.uniform(0.5, 5), set(scene.folder.glob("run-*/*.jsonl"))
        running.until(  # a whole run may be over before
            lambda: time.monotonic() > moment or set(scene.folder.glob("run-*/*.jsonl")) > journals, "the first step"
        )

    interrupt_at(scene, "Ctrl-C while it starts", reach)


@case("Ctrl-C in loading images", racy=True)
def interrupted_in_load(scene: Scene) -> None:
    plan: dict[str, object] = {"point": "load", "do": "announce"}
    interrupt_at(scene, "Ctrl-C in loading images", Running.until_announced, plan)


@case("Ctrl-C in rendezvous", racy=True)
def interrupted_in_rendezvous(scene: Scene) -> None:
    def reach(running: Running) -> None:
        running.until(lambda: list(scene.tmp.glob("cifar-exp-*")), "the rendezvous")
        time.sleep(scene.random.uniform(0, 0.3))

    interrupt_at(scene, "Ctrl-C in rendezvous", reach)


@case("Ctrl-C in evaluation", racy=True)
def interrupted_in_evaluation(scene: Scene) -> None:
    plan: dict[str, object] = {"point": "evaluation", "rank": 0, "number": 2, "do": "announce"}
    interrupt_at(scene, "Ctrl-C in evaluation", Running.until_announced, plan)


@case("Ctrl-C in a save", racy=True)
def interrupted_in_save(scene: Scene) -> None:
    plan: dict[str, object] = {"point": "fsync", "file": "*.pt.cifar-exp-tmp", "rank": 0, "number": 2, "do": "announce"}
    interrupt_at(scene, "Ctrl-C in a save", Running.until_announced, plan)


@case("Ctrl-C while the run is closed", racy=True, needs=("linux",))
def interrupted_at_the_end(scene: Scene) -> None:
    """After the last epoch: whatever was not closed yet is, and the next start finds it finished or finishes it."""
    run = settings(2)
    for number in range(scene.times):
        here = (f"hydra.run.dir=run-{number}", "resume=auto")
        running = scene.start(*run, *here)
        journal = scene.journal(f"run-{number}")
        running.until(lambda path=journal: path.exists() and "test/accuracy" in path.read_text(), "its last line")
        time.sleep(scene.random.uniform(0, 2))
        if running.process.poll() is None:
            running.signal(signal.SIGINT, group=True)
        ended = running.wait()
        trains(scene, ended, 130 if ended.code == 130 else 0, run_dir=f"run-{number}")
        says(scene.run(*run, *here), 0)
        assert statuses(scene) == ["FINISHED"] * (number + 1)
        assert_same_as_uninterrupted(scene, run, f"run-{number}")
        scene.handled("Ctrl-C while the run is closed", "finds it finished, or finishes it")


@case("a stop file", racy=True, needs=("stopping",))
def stop_file(scene: Scene) -> None:
    """A clean end at any moment, with the network kept."""
    for number in range(scene.times):
        here = (f"hydra.run.dir=run-{number}",)
        running = scene.start(*settings(10_000), *here, plan=PACE)
        running.until_training(scene.journal(f"run-{number}"), lines=1 + scene.random.randrange(60))
        (scene.folder / f"run-{number}" / "stop").touch()
        says(running.wait(), 0)
        assert statuses(scene) == ["FINISHED"] * (number + 1)
        assert "test/accuracy" in scene.journal(f"run-{number}").read_text()
        assert list((scene.folder / f"run-{number}" / "checkpoints").glob("*.json"))
        scene.handled("a stop file", "none needed: it ended with its network")


@case("train.max_seconds is over", needs=("stopping",))
def out_of_time(scene: Scene) -> None:
    says(scene.run(*settings(10_000), *HERE, *UNTRACKED, "train.max_seconds=3", plan=PACE), 0)
    assert "test/accuracy" in scene.journal().read_text()
    scene.handled("train.max_seconds is over", "none needed: it ended with its network")
