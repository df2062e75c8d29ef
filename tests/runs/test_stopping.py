"""A stopped run ends between two steps and saves everything; dead ranks are restarted."""

import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cifar_exp.data.batches import EvaluationBatches
from cifar_exp.distributed.process_group import World
from cifar_exp.distributed.rank_control import RankControl
from cifar_exp.distributed.stop_requests import INTERRUPT_FILE
from cifar_exp.errors import DivergenceError
from cifar_exp.records import checkpoint, journal
from cifar_exp.training.metrics import MetricValues
from cifar_exp.worker import final_metrics
from tests.conftest import Command
from tests.helpers.mlflow_runs import all_runs, client
from tests.helpers.paced import ENDLESS, PACED
from tests.helpers.processes import Start, to_every_process, training_ranks, wait_for
from tests.helpers.runs import REPEATABLE, curve, weights
from tests.helpers.tiny_training import train_batches, trainer, validation

# 60 steps an epoch, read every 7: whatever ends it ends it in the midst of an epoch and of a block.
STEPS = [*REPEATABLE, "train.batch_size=8", "train.log_every=7", "train.epochs=6", "devices.oversubscribe=true"]


def manifest(run_dir: Path) -> checkpoint.Manifest:
    found = checkpoint.newest_intact_manifest(run_dir, pytest.fail)
    assert found
    return found


def test_signal_saves_within_an_epoch_and_resume_is_bit_for_bit(
    cifar_exp: Command, started: Start, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedulers and containers send it to every process of the run. A requeued job starts by the same command."""
    run = [*STEPS, "devices.count=2", "train.weight_averaging=0.9"]
    assert cifar_exp(*run, "hydra.run.dir=whole", "tracking=none").returncode == 0
    cut, cuts = workplace / "cut", []
    for number, code in ((signal.SIGTERM, 143), (signal.SIGUSR2, 140)):
        process = started(*run, "hydra.run.dir=cut", "resume=auto")
        before = len(journal.read(cut))
        wait_for(lambda before=before: len(journal.read(cut)) > before + 5, process)
        to_every_process(process, number)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors
        assert "Traceback" not in errors
        cuts.append(manifest(cut).step)
        assert f"saved after step {cuts[-1]}; the same command with resume=cut continues" in output
        # MLflow has but a few seconds to take that in, on a busy machine too.
        assert [run.info.status for run in all_runs(client())] == ["KILLED"] or "cifar-exp sync" in errors
    assert any(step % 60 for step in cuts), "by chance all cuts lay between two epochs"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = cifar_exp(*run, "hydra.run.dir=cut")
    assert again.returncode == 0, again.stderr
    assert "SLURM_RESTART_COUNT=1: the job was requeued, and its run continues" in again.stderr
    assert curve(journal.read(cut)) == curve(journal.read(workplace / "whole"))
    for name, value in weights(workplace / "whole").items():
        assert torch.equal(value, weights(cut)[name]), name
    last = journal.last_values(cut)
    split = [value for name, value in last.items() if name.startswith("time_split/")]
    assert sum(split) == pytest.approx(last["time/total_seconds"], abs=1e-3)
    (record,) = all_runs(client())
    assert record.info.status == "FINISHED"


def test_run_interrupted_on_four_ranks_resumes_on_two(cifar_exp: Command, started: Start, workplace: Path) -> None:
    """Statistics of batch norms are then the mean of the ranks', and every image counts once."""
    run = [*STEPS, "tracking=none", "train.scaling=strong"]
    process = started(*run, "devices.count=4", "hydra.run.dir=cut")
    wait_for(lambda: len(journal.read(workplace / "cut")) > 2, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    again = cifar_exp(*run, "devices.count=2", "resume=cut")
    assert again.returncode == 0, again.stderr
    assert "4 device(s) then, 2 now: 8 images per step in the same order, 4 per device" in again.stdout
    entries = journal.read(workplace / "cut")
    steps = [entry.step for entry in entries if "step/loss" in entry.metrics]
    assert steps == list(range(7, 361, 7))
    assert journal.last_values(workplace / "cut")["test/count"] == 33


@pytest.mark.parametrize("how", ["file", "time"])
def test_run_ended_early_is_finished(cifar_exp: Command, started: Start, workplace: Path, how: str) -> None:
    run = [*STEPS, *PACED, "hydra.run.dir=run"]
    folder = workplace / "run"
    process = started(*run, *(["train.max_seconds=6"] if how == "time" else []))
    if how == "file":
        wait_for(lambda: len(journal.read(folder)) > 5, process)
        (folder / "stop").touch()
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    reason = "train.max_seconds" if how == "time" else "the file stop in the run's folder"
    assert f"training ended early: {reason}" in output
    shown = reason.removesuffix("'s folder")  # the apostrophe is escaped
    assert f">finished early: {shown}" in (folder / "progress.html").read_text()
    assert not (folder / "stop").exists()
    last = journal.last_values(folder)
    assert last["test/count"] == 33
    assert manifest(folder).step == journal.read(folder)[-1].step
    assert sum(v for name, v in last.items() if name.startswith("time_split/")) == pytest.approx(
        last["time/total_seconds"], abs=1e-3
    )
    assert [run.info.status for run in all_runs(client())] == ["FINISHED"]
    if how == "file":
        again = cifar_exp(*run, "resume=auto")
        assert "finished before" in again.stdout


DYING = """
import os, signal
from torch import nn
class Dying(nn.Linear):
    steps = 0
    def forward(self, images):
        Dying.steps += self.training
        if os.environ.get("RANK") == "1" and self.training and Dying.steps == 130 and not os.path.exists("died"):
            open("died", "w").close()
            {how}
        return super().forward(images.flatten(1))
def model(*, num_classes, width, depth):
    return Dying(3072, num_classes)
"""


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), signal.SIGKILL)", "raise RuntimeError('boom')"])
def test_dead_ranks_are_replaced_and_training_resumes(cifar_exp: Command, workplace: Path, how: str) -> None:
    (workplace / "dying.py").write_text(DYING.format(how=how))
    model = ("model._target_=dying.model", "trusted_modules=[dying]", "tracking=none", "devices.count=2")
    done = cifar_exp(*STEPS, *model, "launcher.max_restarts=1", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert (workplace / "died").exists()
    assert "a rank died or hung; restart 1: training resumes from step 120" in done.stderr
    assert "Traceback" not in done.stderr
    whole = cifar_exp(*STEPS, *model, "hydra.run.dir=whole")  # it has died
    assert whole.returncode == 0, whole.stderr
    assert curve(journal.read(workplace / "run")) == curve(journal.read(workplace / "whole"))


def test_a_rank_that_hangs_is_named_with_its_step(started: Start, workplace: Path) -> None:
    process = started(*ENDLESS, "devices.count=2", "launcher.timeout=15", "tracking=none")
    ranks = training_ranks(process, workplace)
    ranks[1].send_signal(signal.SIGSTOP)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 7
    assert "rank 1 hung after step " in errors
    assert "(no heartbeat for launcher.timeout=15 s, it is stopped)" in errors
    assert "Traceback" not in errors


def test_a_network_that_has_diverged_since_the_loss_was_read_is_not_saved(tmp_path: Path, only_rank: World) -> None:
    left, model, _ = trainer(only_rank, log_every=100)
    left.train_step.control = RankControl(tmp_path, every=2)
    (tmp_path / INTERRUPT_FILE).touch()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    saved: list[bool] = []
    with pytest.raises(DivergenceError, match="the loss is nan by step 2"):
        left.fit(train_batches(only_rank), validation(only_rank), epochs=1, save=saved.append)
    assert saved == []


def test_a_network_that_its_last_update_has_broken_is_not_saved(
    tmp_path: Path, only_rank: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its losses were finite, and are those from before the update."""
    left, model, _ = trainer(only_rank, log_every=100)
    left.train_step.control = RankControl(tmp_path, every=2)
    (tmp_path / INTERRUPT_FILE).touch()
    step, taken = left.train_step.optimizer.step, count(1)

    def overshooting() -> None:
        step()
        if next(taken) == 2:
            with torch.no_grad():
                next(model.parameters()).fill_(torch.inf)

    monkeypatch.setattr(left.train_step.optimizer, "step", overshooting)
    saved: list[bool] = []
    with pytest.raises(DivergenceError, match="weights are not finite after step 2"):
        left.fit(train_batches(only_rank), validation(only_rank), epochs=1, save=saved.append)
    assert saved == []


def test_training_interrupted_in_an_evaluation_evaluates_again_and_reports_once(
    tmp_path: Path, only_rank: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, model, expected = trainer(only_rank)
    whole.fit(train_batches(only_rank), validation(only_rank), epochs=1)
    cut, half_trained, reported = trainer(only_rank)
    cut.train_step.control = RankControl(tmp_path)
    (tmp_path / INTERRUPT_FILE).touch()
    monkeypatch.setattr(RankControl, "agreed", lambda _self, _point: None)  # it is noticed in the evaluation alone
    saved: list[bool] = []
    assert cut.fit(train_batches(only_rank), validation(only_rank), epochs=1, save=saved.append) is None
    assert saved == [True]
    again, other_model, rest = trainer(only_rank)
    other_model.load_state_dict(half_trained.state_dict())
    again.load_state_dict(cut.state_dict(), same_run=True)
    final = again.fit(train_batches(only_rank), validation(only_rank), epochs=1)
    assert final is not None
    assert final.count == 9

    def figures(reports: list[tuple[int, int, dict[str, float]]]) -> list[tuple[int, str, float]]:
        return [(step, name, v) for step, _, values in reports for name, v in values.items() if "second" not in name]

    assert figures(reported + rest) == figures(expected)
    assert len({(step, name) for step, name, _ in figures(expected)}) == len(figures(expected))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other_model.state_dict()[name]), name


def test_the_final_test_gives_a_heartbeat_for_each_batch(tmp_path: Path, only_rank: World) -> None:
    """Three passes over a test set may take longer than ``launcher.timeout``, after which a silent rank is ended."""
    tested, _, _ = trainer(only_rank)
    control = RankControl(tmp_path)
    signs: list[bytes] = []

    class Watched(EvaluationBatches):
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for batch in super().__iter__():
                yield batch
                signs.append((tmp_path / "beat-0").read_bytes())

    ours = validation(only_rank)
    batches = Watched(ours.source, ours.normalization, ours.rank, ours.world_size, batch_size=4)
    job = SimpleNamespace(data=SimpleNamespace(validation_count=1), train=SimpleNamespace(mirrored_evaluation=True))
    final_metrics.test_metrics(tested, batches, MetricValues(0.0, 0.0, 0), job, control)  # type: ignore[arg-type]
    assert len(signs) == len(set(signs)) == 6
