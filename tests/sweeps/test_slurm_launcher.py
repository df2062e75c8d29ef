"""The Slurm launcher without a cluster: when a job is requeued, and what becomes of jobs without a result."""

import importlib
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from cifar_exp.config.defaults import conf_dir
from cifar_exp.config.slurm_settings import Resources
from cifar_exp.errors import ConfigError, DataError, MachineError, Stopped, WorkerError
from cifar_exp.sweeps import slurm_job, slurm_launcher, slurm_results
from cifar_exp.sweeps.slurm_job import SlurmJob
from cifar_exp.sweeps.slurm_launcher import SlurmLauncher, Submission
from cifar_exp.system import slurm
from cifar_exp.system.signals import STOPPING
from tests.conftest import TINY, Command

RUNNING, NOW = {"JobState": "RUNNING"}, "2026-01-01T00:00:00"
PREEMPTED = RUNNING | {"PreemptTime": NOW, "Restarts": "7"}


@pytest.mark.parametrize(
    ("number", "facts", "requeued"),
    [
        (signal.SIGTERM, PREEMPTED, True),
        (signal.SIGTERM, RUNNING | {"PreemptTime": "None", "Restarts": "0"}, False),  # a signal by hand
        (signal.SIGTERM, {"JobState": "COMPLETING", "PreemptTime": "None"}, False),  # scancel, or requeued by Slurm
        (signal.SIGUSR2, RUNNING | {"PreemptTime": "None", "Restarts": "0"}, True),  # the time limit is near
        (signal.SIGUSR2, RUNNING | {"PreemptTime": "None", "Restarts": "2"}, False),
        (signal.SIGUSR2, PREEMPTED, True),  # preemption does not count
        (signal.SIGINT, RUNNING, False),
        (signal.SIGTERM, {}, False),  # no answer
    ],
)
def test_a_job_is_requeued_before_its_time_limit_and_when_preempted(
    number: int, facts: dict[str, str], requeued: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    for name, value in (("SLURM_JOB_ID", "12"), ("SLURM_ARRAY_JOB_ID", "12"), ("SLURM_ARRAY_TASK_ID", "3")):
        monkeypatch.setenv(name, value)  # the last job of an array has the array's number
    monkeypatch.setattr(slurm, "job_facts", lambda _: facts)
    monkeypatch.setattr(slurm, "requeue", lambda job: asked.append(job) or True)
    slurm_job._requeue_if_resumable(Stopped(number), most=2)
    assert asked == ["12_3"] * requeued


def test_failures_of_a_job_keep_their_message_and_exit_code_in_a_pickle() -> None:
    for error, code in ((ConfigError("a=1: wrong"), 2), (DataError("no images"), 3), (ZeroDivisionError("x"), 1)):
        failed = slurm_job._portable(JobReturn(status=JobStatus.FAILED, _return_value=error))
        assert failed._return_value.exit_code == code
        assert type(failed._return_value)(*failed._return_value.args).exit_code == code
    done = JobReturn(status=JobStatus.COMPLETED, _return_value=0.5)
    assert slurm_job._portable(done)._return_value == 0.5


def submission(number: int, folder: Path, result: JobReturn | None = None) -> Submission:
    """A submitted job; with a result it has ended."""
    pickle = folder / f"{number}.pkl"
    if result:
        pickle.touch()
    paths = SimpleNamespace(result_pickle=pickle, stdout=folder / f"{number}.out")
    job: Any = SimpleNamespace(job_id=f"9_{number}", paths=paths, result=lambda: result)
    return Submission(number, [f"seed={number}", "tracking=none"], folder / str(number), Resources(1, 0), job)


def test_a_job_that_slurm_ended_fails_and_the_others_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = JobReturn(status=JobStatus.COMPLETED, _return_value=0.5)
    jobs = [submission(0, tmp_path, ended), submission(1, tmp_path), submission(2, tmp_path, ended)]
    answers = iter([None, {"9_1"}, set(), set()])
    monkeypatch.setattr(slurm, "queued_jobs", lambda: next(answers, set()))
    monkeypatch.setattr(slurm, "job_facts", lambda _: {"JobState": "OUT_OF_MEMORY"})
    for name, value in (("LOOK_SECONDS", 0.001), ("ASK_SECONDS", (0.0, 0.0)), ("LATE_SECONDS", 0.01)):
        monkeypatch.setattr(slurm_results, name, value)
    first, lost, third = slurm_results.results(jobs)
    assert first is third is ended
    failure = lost._return_value
    assert isinstance(failure, WorkerError)
    assert "Slurm job 9_1: it ended without a result, in Slurm's state OUT_OF_MEMORY. Set hydra.launcher.mem_gb" in str(
        failure
    )
    assert lost.hydra_cfg
    assert lost.hydra_cfg.hydra.runtime.output_dir == str(tmp_path / "1")
    output, errors = capsys.readouterr()
    assert output.splitlines() == ["job 0 finished: seed=0", "job 2 finished: seed=2"]
    assert "Slurm does not answer" in errors
    assert next(answers, None) is None  # a queue with the job in it, and no answer, end nothing


def test_a_signal_cancels_the_jobs_that_have_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [submission(0, tmp_path, JobReturn()), submission(1, tmp_path), submission(2, tmp_path)]
    cancelled: list[str] = []
    monkeypatch.setattr(slurm, "cancel", lambda ids: cancelled.extend(ids) or True)
    monkeypatch.setattr(slurm, "queued_jobs", lambda: set())
    with pytest.raises(Stopped), slurm_results.cancelled_on_stop(jobs, tmp_path):
        raise Stopped(signal.SIGINT)
    assert cancelled == ["9_1", "9_2"]


def test_variables_of_the_job_around_the_sweep_are_hidden_from_new_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", "here")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with slurm.outside_of_job():
        inside = dict(slurm.os.environ)
    assert "SLURM_RESTART_COUNT" not in inside
    assert inside["SLURM_CONF"] == "here"
    assert inside["SBATCH_ACCOUNT"] == "mine"
    assert slurm.os.environ["SLURM_RESTART_COUNT"] == "1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["devices=auto"], "devices=auto: where a job is submitted"),
        (["hydra.launcher.time=0"], "hydra.launcher.time=0: it must be 1 or more"),
        (["hydra.launcher.nosuch=1"], "hydra.launcher.nosuch: there is no such setting"),
        (["tracking.uri=http://me:opensesame@127.0.0.1:9"], "it holds a password"),
        (["experiment=speedup"], "devices.count: the preset has all counts"),
    ],
)
def test_what_is_refused_leaves_no_folder(words: list[str], message: str, cifar_exp: Command, workplace: Path) -> None:
    tiny = [word for word in TINY if not (word.startswith("devices.count") and words == ["experiment=speedup"])]
    refused = cifar_exp("-m", "hydra/launcher=slurm", *tiny, "seed=0,1", *words)
    assert refused.returncode == 2, refused.stderr
    assert message in refused.stderr
    assert "opensesame" not in refused.stderr
    assert not list((workplace / "outputs").glob("multirun*"))


def test_a_signal_during_an_import_ends_the_job_without_an_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception that goes through the import of a C++ extension would abort the process before it is requeued."""

    class EndedError(BaseException):
        pass

    def end(code: int) -> None:
        ended.append(code)
        raise EndedError

    ended: list[int] = []
    nothing: Any = None
    job = SlurmJob(nothing, nothing, nothing, max_requeues=1)
    monkeypatch.setattr(slurm_job, "_requeue_if_resumable", lambda stopped, most: ended.append(stopped.number + most))
    monkeypatch.setattr(slurm_job, "ignore_signals", lambda: None)
    monkeypatch.setattr(slurm_job.atexit, "_run_exitfuncs", lambda: None)
    monkeypatch.setattr(slurm_job.os, "_exit", end)
    (tmp_path / "signalled_import.py").write_text("import signal\nsignal.raise_signal(signal.SIGUSR2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = {number: signal.getsignal(number) for number in STOPPING}
    signal.signal(signal.SIGUSR2, job._answer)
    try:
        with pytest.raises(EndedError):
            importlib.import_module("signalled_import")
        assert ended == [signal.SIGUSR2 + 1, 128 + signal.SIGUSR2]
        job._answer(signal.SIGUSR2, None)  # after the ranks have saved
        assert len(ended) == 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_message_without_submitit_or_slurm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    preset: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "hydra/launcher/slurm.yaml"))
    launcher = SlurmLauncher(**{name: value for name, value in preset.items() if name != "_target_"})
    context: Any = object()
    launcher.setup(hydra_context=context, task_function=lambda _: None, config=OmegaConf.create({"hydra": {}}))
    monkeypatch.setattr(slurm_launcher.shutil, "which", lambda _: "/usr/bin/sbatch")
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(MachineError, match=r"submitit is not installed. Run pip install 'cifar-exp\[slurm\]'"):
        launcher.check([], [])
    monkeypatch.setattr(slurm_launcher.shutil, "which", lambda _: None)
    with pytest.raises(MachineError, match="there is no sbatch on this host"):
        launcher.check([], [])
