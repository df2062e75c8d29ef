"""Sweeps: a failing job, a killed parent, many at once, and one that takes hours."""

import signal
import time
from pathlib import Path
from statistics import linear_regression

import psutil

from cifar_exp.records import journal
from tests.faults.registry import case
from tests.faults.runs import assert_recorded_once, rows, settings, statuses
from tests.faults.scene import LIMIT, Running, Scene, check_exit
from tests.helpers.runs import curve

EPOCHS_A_JOB = 10
ONE_RANK = ("devices.count=1", "train.batch_size=16")


def jobs(scene: Scene) -> list[Path]:
    """The jobs' folders, relative to the scene's folder, by number."""
    found = [path.parent.relative_to(scene.folder) for path in scene.folder.glob("outputs/multirun/*/*/*/run.json")]
    return sorted(found, key=lambda path: (path.parent, int(path.name)))


@case("one failing job of a sweep")
def failing_job(scene: Scene) -> None:
    """The other jobs are trained. The exit code is that of the failure."""
    sweep = ("-m", *settings(2, *ONE_RANK), "train.batch_size=16,4096,8")
    for number in range(2):  # the second start skips finished jobs
        ended = scene.run(*sweep, *(["resume=auto"] if number else []))
        check_exit(ended, 2, "job 1 failed: train.batch_size=4096")
        trained = [job for job in jobs(scene) if job.name != "1" and finished(scene, job)]
        assert len(trained) == 2
        assert sorted(statuses(scene)) == ["FAILED", "FINISHED", "FINISHED"], statuses(scene)  # the sweep and two jobs
    scene.handled("one failing job of a sweep", "skips the finished ones, tries the failed one again")


@case("SIGKILL of a sweep's parent", "Ctrl-C in a sweep", racy=True, needs=("linux",))
def interrupted_sweep(scene: Scene) -> None:
    """Interrupt one sweep repeatedly: finished jobs are skipped, unfinished ones resume."""
    seeds = ",".join(map(str, range(2 + scene.times)))
    sweep = ("-m", *settings(EPOCHS_A_JOB, *ONE_RANK), f"seed={seeds}", "resume=auto")
    for fault, number, code in (("SIGKILL of a sweep's parent", signal.SIGKILL, -9), ("Ctrl-C in a sweep", 2, 130)):
        for _ in range(scene.times):
            before = {job: scene.journal(str(job)).read_bytes() for job in jobs(scene) if finished(scene, job)}
            lines = total_lines(scene)
            wanted = lines + 1 + scene.random.randrange(40)
            running = scene.start(*sweep, plan={"pace": 0.02})
            running.until(lambda wanted=wanted: total_lines(scene) >= wanted, "training")
            running.signal(number, group=number == signal.SIGINT)
            check_exit(running.wait(), code)
            for job, content in before.items():
                assert scene.journal(str(job)).read_bytes() == content, f"{job} was trained twice"
            scene.handled(fault, "skips the finished jobs and resumes the unfinished one")
    check_exit(scene.run(*sweep), 0)
    assert len(jobs(scene)) == 2 + scene.times, jobs(scene)
    assert len({job.parent for job in jobs(scene)}) == 1
    assert statuses(scene) == ["FINISHED"] * (3 + scene.times), statuses(scene)
    for job in jobs(scene):
        assert_recorded_once(scene, str(job))
        losses = [step for step, name, _ in curve(journal.read(scene.folder / job)) if name == "step/loss"]
        assert losses == sorted(set(losses)), f"{job} has a step twice"


def finished(scene: Scene, job: Path) -> bool:
    return "time/total_seconds" in journal.last_values(scene.folder / job)


def total_lines(scene: Scene) -> int:
    return sum(path.read_bytes().count(b"\n") for path in scene.folder.glob("outputs/multirun/*/*/*/metrics.jsonl"))


@case("eight sweeps at once into one fresh store")
def eight_sweeps(scene: Scene) -> None:
    """Every job has its MLflow run, with every point once."""
    count = 8
    sweeps: list[Running] = []
    for number in range(count):
        tmp = scene.base / f"tmp-{number}"
        tmp.mkdir()
        sweeps.append(scene.start("-m", *settings(2, *ONE_RANK), f"seed={2 * number},{2 * number + 1}", tmp=tmp))
    for sweep in sweeps:
        check_exit(sweep.wait(3 * LIMIT), 0)
    assert len(jobs(scene)) == 2 * count
    assert statuses(scene) == ["FINISHED"] * 3 * count
    for job in jobs(scene):
        assert_recorded_once(scene, str(job))
    parents = rows(scene, "SELECT value, count(*) FROM tags WHERE key = 'mlflow.parentRunId' GROUP BY value")
    assert [children for _, children in parents] == [2] * count, parents
    scene.handled("eight sweeps at once into one fresh store", "none needed: nothing is lost")


MEGABYTE = 1e6
SETTLED = 20  # jobs before the measurement starts; the first ones allocate what all use


@case("a sweep of 200 runs", slow=True, needs=("linux",))
def long_sweep(scene: Scene) -> None:
    """Open files and threads of parent and fork server do not grow, their memory by at most 0.1 MB per run."""
    count = scene.suite.jobs
    running = scene.start("-m", *settings(1, *ONE_RANK), f"seed=range({count})")
    samples: list[list[tuple[float, int, int]]] = []
    while running.process.poll() is None:
        done = sum(finished(scene, job) for job in jobs(scene)[-2:]) + max(0, len(jobs(scene)) - 2)
        if done > len(samples) and (fork_server := running.fork_server()):
            try:
                samples.append([usage(psutil.Process(running.process.pid)), usage(fork_server)])
            except psutil.Error:
                continue
        time.sleep(0.1)
    check_exit(running.wait(), 0)
    assert statuses(scene) == ["FINISHED"] * (count + 1)
    settled = samples[min(SETTLED, count // 4) :]
    assert len(settled) > count // 3, f"only {len(samples)} of {count} jobs were measured"
    usages = []
    for number, who in enumerate(("parent", "fork server")):
        memory, files, threads = zip(*(sample[number] for sample in settled), strict=True)
        growth = linear_regression(range(len(memory)), memory).slope / MEGABYTE
        usages.append(
            f"{who} {growth:+.3f} MB a run, {files[0]} to {files[-1]} files, {threads[0]} to {threads[-1]} threads"
        )
        assert growth <= 0.1, usages
        assert max(files[-5:]) <= max(files[:10]), usages
        assert max(threads[-5:]) <= max(threads[:10]), usages
    scene.handled("a sweep of 200 runs", f"none needed: {'; '.join(usages)}")


def usage(process: psutil.Process) -> tuple[float, int, int]:
    """Memory in bytes, open files, threads."""
    return float(process.memory_info().rss), process.num_fds(), process.num_threads()
