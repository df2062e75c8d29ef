"""Signals to every process of a run, once or twice, as schedulers, containers and `timeout` send them."""

import signal
import time

from tests.faults.interruptions import PACE, RESUMES, interrupt_at, interrupt_repeatedly
from tests.faults.registry import case
from tests.faults.runs import (
    EPOCHS_A_TRY,
    HERE,
    UNTRACKED,
    assert_same_as_uninterrupted,
    check_exit_and_status,
    settings,
)
from tests.faults.scene import Running, Scene, check_exit


@case("SIGTERM of every process", racy=True, needs=("linux",))
def all_terminated(scene: Scene) -> None:
    """As scancel, docker stop and systemd do."""
    fault = "SIGTERM of every process"
    interrupt_repeatedly(scene, fault, lambda run: run.signal(signal.SIGTERM, group=True), 143, status="KILLED")


@case("SIGUSR1 of every process", racy=True, needs=("linux",))
def all_preempted(scene: Scene) -> None:
    fault = "SIGUSR1 of every process"
    interrupt_repeatedly(scene, fault, lambda run: run.signal(signal.SIGUSR1, group=True), 138, status="KILLED")


@case("SIGTERM of every process, saved within the step", racy=True, needs=("linux",))
def all_terminated_twice(scene: Scene) -> None:
    """`timeout` signals the command, then its process group. A checkpoint is saved all the same."""
    run = settings(10_000)
    for tried in range(scene.times):
        here = (f"hydra.run.dir=run-{tried}", *UNTRACKED, "checkpoint.every=1000")
        running = scene.start(*run, *here, plan=PACE)
        running.until_training(scene.journal(f"run-{tried}"), lines=1 + scene.random.randrange(30))
        running.signal(signal.SIGTERM)
        running.signal(signal.SIGTERM, group=True)
        check_exit(running.wait(), 143)
        assert list((scene.folder / f"run-{tried}" / "checkpoints").glob("*.json")), "nothing was saved"
        scene.handled("SIGTERM of every process, saved within the step", RESUMES)


@case("SIGTERM of every process while it starts", racy=True, needs=("linux",))
def all_terminated_at_start(scene: Scene) -> None:
    def reach(running: Running) -> None:
        running.until_it_answers_signals()
        moment, journals = time.monotonic() + scene.random.uniform(0, 8), set(scene.folder.glob("run-*/*.jsonl"))
        running.until(
            lambda: time.monotonic() > moment or set(scene.folder.glob("run-*/*.jsonl")) > journals, "the first step"
        )

    interrupt_at(scene, "SIGTERM of every process while it starts", reach, number=signal.SIGTERM)


@case("SIGTERM of every process in evaluation", racy=True)
def all_terminated_in_evaluation(scene: Scene) -> None:
    plan: dict[str, object] = {"point": "evaluation", "rank": 0, "number": 2, "do": "announce"}
    fault = "SIGTERM of every process in evaluation"
    interrupt_at(scene, fault, Running.until_announced, plan, signal.SIGTERM)


@case("SIGTERM of every process in a save", racy=True)
def all_terminated_in_save(scene: Scene) -> None:
    plan: dict[str, object] = {"point": "fsync", "file": "*.pt.cifar-exp-tmp", "rank": 0, "number": 2, "do": "announce"}
    fault = "SIGTERM of every process in a save"
    interrupt_at(scene, fault, Running.until_announced, plan, signal.SIGTERM)


@case("SIGTERM of a rank, fork server or resource tracker", needs=("linux",))
def helpers_terminated(scene: Scene) -> None:
    """These processes ignore SIGTERM; only the command handles it."""
    run = settings(EPOCHS_A_TRY)
    running = scene.start(*run, *HERE, plan=PACE)
    running.until_training(scene.journal(), lines=5)
    for process in running.helpers():
        process.terminate()
    check_exit_and_status(scene, running.wait(), 0, "FINISHED")
    assert_same_as_uninterrupted(scene, run)
    scene.handled("SIGTERM of a rank, fork server or resource tracker", "none needed: it trains to the end")
