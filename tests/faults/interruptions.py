"""Processes that die, hang or get a signal, at any moment."""

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
    check_exit_and_status,
    check_exit_and_sync,
    settings,
    statuses,
)
from tests.faults.scene import Running, Scene, check_exit

RESUMES = "resumes, bit for bit"
PACE = {"pace": 0.05}  # seconds per step, slow enough to interrupt it


def interrupt_repeatedly(
    scene: Scene, fault: str, strike: Callable[[Running], None], code: int, *words: str, status: str = "FAILED"
) -> None:
    """Interrupt one run ``scene.times`` times at random moments, resume it each time, and let it finish.

    At the end, its weights equal those of the uninterrupted run, and MLflow has every point once.
    """
    run = settings(EPOCHS_A_TRY * scene.times)
    for _ in range(scene.times):
        running = scene.start(*run, *HERE, plan=PACE)
        running.until_training(scene.journal(), lines=1 + scene.random.randrange(EPOCHS_A_TRY * 3))
        strike(running)
        if status == "RUNNING":
            check_exit(running.wait(), code)
            assert statuses(scene) in ([], ["RUNNING"])  # killed before or after the tracker created the run
        else:
            check_exit_and_status(scene, running.wait(), code, status, *words)
        scene.handled(fault, RESUMES)
    check_exit_and_status(scene, scene.run(*run, *HERE), 0, "FINISHED")
    assert_recorded_once(scene)
    assert_same_as_uninterrupted(scene, run)


@case("SIGKILL of rank 0", racy=True, needs=("linux",))
def rank_0_killed(scene: Scene) -> None:
    interrupt_repeatedly(scene, "SIGKILL of rank 0", lambda run: run.ranks()[0].kill(), 7, "rank 0", "SIGKILL")


@case("SIGKILL of rank 1", racy=True, needs=("linux",))
def rank_1_killed(scene: Scene) -> None:
    interrupt_repeatedly(scene, "SIGKILL of rank 1", lambda run: run.ranks()[1].kill(), 7, "rank 1", "SIGKILL")


@case("SIGKILL of all ranks at once", racy=True, needs=("linux",))
def all_ranks_killed(scene: Scene) -> None:
    def strike(running: Running) -> None:
        for rank in running.ranks():
            rank.kill()

    interrupt_repeatedly(scene, "SIGKILL of all ranks at once", strike, 7, "SIGKILL")


@case("SIGKILL of the fork server", racy=True, needs=("linux",))
def fork_server_killed(scene: Scene) -> None:
    def strike(running: Running) -> None:
        fork_server = running.fork_server()
        assert fork_server
        fork_server.kill()

    interrupt_repeatedly(scene, "SIGKILL of the fork server", strike, 7)


@case("SIGTERM of the parent", racy=True, needs=("linux",))
def parent_terminated(scene: Scene) -> None:
    interrupt_repeatedly(scene, "SIGTERM of the parent", lambda run: run.signal(signal.SIGTERM), 143, status="KILLED")


@case("Ctrl-C in training", racy=True, needs=("linux",))
def interrupted(scene: Scene) -> None:
    """As in a terminal, every process of the group gets the signal."""
    interrupt_repeatedly(
        scene, "Ctrl-C in training", lambda run: run.signal(signal.SIGINT, group=True), 130, status="KILLED"
    )


@case("the terminal is closed (SIGHUP)", racy=True, needs=("linux",))
def terminal_closed(scene: Scene) -> None:
    interrupt_repeatedly(
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
    check_exit_and_status(scene, running.wait(), 0, "FINISHED")
    assert_same_as_uninterrupted(scene, run)
    scene.handled("the terminal is closed under nohup", "none needed: it trains to the end")


@case("SIGTERM of the parent while a rank is stopped", needs=("linux",))
def parent_terminated_beside_a_stopped_rank(scene: Scene) -> None:
    """The stopped rank reacts to SIGKILL only; torch elastic alone would wait 30 s for it."""
    run = settings(EPOCHS_A_TRY)
    running = scene.start(*run, *HERE, plan=PACE)
    running.until_training(scene.journal(), lines=10)
    running.ranks()[1].suspend()
    running.signal(signal.SIGTERM)
    ended = running.wait(25)
    check_exit(ended, 143)
    assert statuses(scene) == ["KILLED"] or "cifar-exp sync" in ended.err  # the ranks used most of the time limit
    check_exit(scene.run(*run, *HERE), 0)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("SIGTERM of the parent while a rank is stopped", RESUMES)


@case("SIGKILL of the parent", racy=True, needs=("linux",))
def parent_killed(scene: Scene) -> None:
    """MLflow shows the run as RUNNING until the next start resumes it."""
    interrupt_repeatedly(
        scene, "SIGKILL of the parent", lambda run: run.signal(signal.SIGKILL), -signal.SIGKILL, status="RUNNING"
    )


@case("SIGTERM twice", racy=True, needs=("linux",))
def terminated_twice(scene: Scene) -> None:
    def strike(running: Running) -> None:
        running.signal(signal.SIGTERM)
        time.sleep(scene.random.uniform(0, 0.5))
        if running.process.poll() is None:
            running.signal(signal.SIGTERM)

    interrupt_repeatedly(scene, "SIGTERM twice", strike, 143, status="KILLED")


def fail_once(
    scene: Scene, fault: str, plan: dict[str, object], code: int, *words: str, traceback: bool = False
) -> None:
    """One run that fails as planned; a second start, without the fault, resumes it."""
    run = settings(EPOCHS_A_TRY)
    hit = scene.run(*run, *HERE, plan=plan)
    check_exit_and_status(scene, hit, code, "FAILED", *words, traceback=traceback)
    check_exit_and_status(scene, scene.run(*run, *HERE), 0, "FINISHED")
    assert_recorded_once(scene)
    assert_same_as_uninterrupted(scene, run)
    scene.handled(fault, RESUMES)


def at_random_step(scene: Scene, do: str, rank: int = 1) -> dict[str, object]:
    """Plan a fault for a random step after the first two epochs."""
    return {"point": "train", "rank": rank, "number": scene.random.randrange(14, 46), "do": do}


@case("os._exit(0) in a rank", quick=True)
def rank_exits(scene: Scene) -> None:
    fail_once(scene, "os._exit(0) in a rank", at_random_step(scene, "exit"), 7, "rank 1")


@case("os._exit(0) in rank 0")
def rank_0_exits(scene: Scene) -> None:
    fail_once(scene, "os._exit(0) in rank 0", at_random_step(scene, "exit", 0), 7, "rank 0")


@case("os._exit(0) in the only rank")
def only_rank_exits(scene: Scene) -> None:
    run = settings(EPOCHS_A_TRY, "devices.count=1")
    check_exit_and_status(scene, scene.run(*run, *HERE, plan=at_random_step(scene, "exit", 0)), 7, "FAILED", "rank 0")
    check_exit_and_status(scene, scene.run(*run, *HERE), 0, "FINISHED")
    assert_same_as_uninterrupted(scene, run)
    scene.handled("os._exit(0) in the only rank", RESUMES)


@case("segmentation fault in a rank")
def rank_segfaults(scene: Scene) -> None:
    fail_once(scene, "segmentation fault in a rank", at_random_step(scene, "segfault"), 7, "rank 1", "SIGSEGV")


@case("abort in a rank")
def rank_aborts(scene: Scene) -> None:
    fail_once(scene, "abort in a rank", at_random_step(scene, "abort"), 7, "rank 1", "SIGABRT")


@case("exception in a rank")
def rank_raises(scene: Scene) -> None:
    words = ("rank 1 failed", "the flux capacitor is empty")
    fail_once(scene, "exception in a rank", at_random_step(scene, "raise"), 7, *words, traceback=True)


@case("memory error in a rank")
def rank_without_memory(scene: Scene) -> None:
    fail_once(
        scene, "memory error in a rank", at_random_step(scene, "memory"), 7, "rank 1", "MemoryError", traceback=True
    )


@case("NaN at step k")
def not_a_number(scene: Scene) -> None:
    fail_once(scene, "NaN at step k", at_random_step(scene, "nan"), 6, "the loss is nan by step", "optimizer.lr")


@case("infinity at step k on one rank")
def infinite(scene: Scene) -> None:
    fail_once(scene, "infinity at step k on one rank", at_random_step(scene, "inf"), 6, "the loss is", "by step")


@case("NaN in evaluation")
def not_a_number_in_evaluation(scene: Scene) -> None:
    plan = {"point": "evaluation", "rank": 0, "number": 4, "do": "nan"}
    fail_once(scene, "NaN in evaluation", plan, 6, "the loss is nan")


LIMITED = ("launcher.timeout=8",)  # seconds without a heartbeat


@case("SIGSTOP of a rank", racy=True, needs=("linux", "watchdog"))
def rank_stopped(scene: Scene) -> None:
    """The message names the stopped rank and its step. The rank, which reacts to SIGKILL only, is ended."""
    run = settings(EPOCHS_A_TRY * (scene.times + 1), *LIMITED)
    for _ in range(scene.times):
        running = scene.start(*run, *HERE, plan=PACE)
        running.until_training(scene.journal(), lines=1 + scene.random.randrange(EPOCHS_A_TRY * 3))
        rank = scene.random.randrange(2)
        running.ranks()[rank].suspend()
        ended = running.wait()
        check_exit(ended, 7, f"rank {rank}", "step", "launcher.timeout")
        assert statuses(scene) == ["FAILED"]
        scene.handled("SIGSTOP of a rank", RESUMES)
    check_exit(scene.run(*run, *HERE), 0)
    assert_same_as_uninterrupted(scene, run)


@case("a rank hangs", needs=("watchdog",))
def rank_hangs(scene: Scene) -> None:
    run = settings(EPOCHS_A_TRY, *LIMITED)
    check_exit(scene.run(*run, *HERE, plan=at_random_step(scene, "hang")), 7, "rank 1", "step", "launcher.timeout")
    check_exit(scene.run(*run, *HERE), 0)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("a rank hangs", RESUMES)


@case("SIGKILL of a rank that is replaced", racy=True, needs=("linux", "restarts"))
def rank_replaced(scene: Scene) -> None:
    """``launcher.max_restarts``: the same command resumes from the last checkpoint each time."""
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
        scene.handled("SIGKILL of a rank that is replaced", "none needed: it resumed by itself, bit for bit")
    ended = running.wait()
    assert ended.code == 0, ended.err
    assert statuses(scene) == ["FINISHED"]
    assert_recorded_once(scene)
    assert_same_as_uninterrupted(scene, run)


@case("ranks die more often than launcher.max_restarts", needs=("linux", "restarts"))
def rank_dies_again(scene: Scene) -> None:
    run = settings(EPOCHS_A_TRY, "launcher.max_restarts=1")
    plan = {"point": "train", "rank": 1, "number": 9, "do": "kill"}  # in every process that is rank 1
    check_exit(scene.run(*run, *HERE, plan=plan), 7, "rank 1", "SIGKILL")
    assert statuses(scene) == ["FAILED"]
    check_exit(scene.run(*run, *HERE), 0)
    assert_same_as_uninterrupted(scene, run)
    scene.handled("ranks die more often than launcher.max_restarts", RESUMES)


def interrupt_at(
    scene: Scene,
    fault: str,
    reach: Callable[[Running], None],
    plan: dict[str, object] | None = None,
    number: int = signal.SIGINT,
) -> None:
    """Send a signal to all processes at a given point. The MLflow status is KILLED; the next start trains it.

    On a busy machine the seconds after the signal may not suffice to write the status. Then the command says so, and
    ``cifar-exp sync`` writes it.
    """
    run = settings(EPOCHS_A_TRY)
    for tried in range(scene.times):
        here = (f"hydra.run.dir=run-{tried}", "resume=auto")
        running = scene.start(*run, *here, plan=plan)
        reach(running)
        running.signal(number, group=True)
        ended = running.wait()
        check_exit(ended, 128 + number)
        if f"cifar-exp sync run-{tried}" in ended.err:
            check_exit(scene.run("sync", f"run-{tried}"), 0)
        assert set(statuses(scene)) <= {"KILLED", "FINISHED"}, statuses(scene)
        if tried == 0 or scene.random.random() < 0.1:  # the next start is the same each time, so a sample is enough
            check_exit(scene.run(*run, *here), 0)
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
        running.until(  # the run may finish earlier
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
    """After the last epoch. The next start finds the run finished, or finishes it."""
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
        check_exit_and_sync(scene, ended, 130 if ended.code == 130 else 0, run_dir=f"run-{number}")
        check_exit(scene.run(*run, *here), 0)
        assert statuses(scene) == ["FINISHED"] * (number + 1)
        assert_same_as_uninterrupted(scene, run, f"run-{number}")
        scene.handled("Ctrl-C while the run is closed", "finds it finished, or finishes it")


@case("a stop file", racy=True, needs=("stopping",))
def stop_file(scene: Scene) -> None:
    """A clean end at any moment, with the network saved."""
    for number in range(scene.times):
        here = (f"hydra.run.dir=run-{number}",)
        running = scene.start(*settings(10_000), *here, plan=PACE)
        running.until_training(scene.journal(f"run-{number}"), lines=1 + scene.random.randrange(60))
        (scene.folder / f"run-{number}" / "stop").touch()
        check_exit(running.wait(), 0)
        assert statuses(scene) == ["FINISHED"] * (number + 1)
        assert "test/accuracy" in scene.journal(f"run-{number}").read_text()
        assert list((scene.folder / f"run-{number}" / "checkpoints").glob("*.json"))
        scene.handled("a stop file", "none needed: it ended and saved its network")


@case("train.max_seconds is over", needs=("stopping",))
def out_of_time(scene: Scene) -> None:
    check_exit(scene.run(*settings(10_000), *HERE, *UNTRACKED, "train.max_seconds=3", plan=PACE), 0)
    assert "test/accuracy" in scene.journal().read_text()
    scene.handled("train.max_seconds is over", "none needed: it ended and saved its network")
