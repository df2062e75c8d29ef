"""A killed run resumes with the same losses and weights as an uninterrupted run, and logs each point once."""

import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from cifar_exp.records import journal
from cifar_exp.sweeps.sweep_resume import claimed_sweep, end_sweep
from cifar_exp.system.host import own_cores
from cifar_exp.tracking.mlflow_store import PARENT_TAG
from tests.conftest import TINY, Command
from tests.helpers.checkpoints import reseal
from tests.helpers.mlflow_runs import all_runs, client
from tests.helpers.processes import Start, wait_for
from tests.helpers.runs import REPEATABLE, curve, weights


def killed_after(started: Start, run_dir: Path, epochs: int, *arguments: str) -> None:
    """A run whose parent was killed once it had ``epochs`` checkpoints."""
    process = started(*arguments, f"hydra.run.dir={run_dir}", "checkpoint.keep=100")
    wait_for(lambda: len(list(run_dir.glob("checkpoints/*.json"))) >= epochs, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("ranks", [1, 4])  # two: ``test_stopping.py`` and the fault suite
def test_resume_after_kill_continues_bit_for_bit(
    cifar_exp: Command, started: Start, workplace: Path, ranks: int
) -> None:
    run = [*REPEATABLE, f"devices.count={ranks}", "devices.oversubscribe=true", "train.batch_size=8"]
    whole = cifar_exp(*run, "hydra.run.dir=whole", "tracking=none")
    assert whole.returncode == 0, whole.stderr
    killed_after(started, workplace / "cut", 3, *run)
    before = journal.read(workplace / "cut")
    assert before[-1].epoch < 16

    again = cifar_exp(*run, "hydra.run.dir=cut", "resume=auto")
    assert again.returncode == 0, again.stderr
    assert "continues after epoch" in again.stdout
    entries = journal.read(workplace / "cut")
    assert entries[: len(before)] == before
    assert curve(entries) == curve(journal.read(workplace / "whole"))
    for name, value in weights(workplace / "whole").items():
        assert torch.equal(value, weights(workplace / "cut")[name]), name
    times = [entry.time for entry in entries]
    assert times == sorted(times)
    last = journal.last_values(workplace / "cut")
    split = [value for name, value in last.items() if name.startswith("time_split/")]
    assert sum(split) == pytest.approx(last["time/total_seconds"], abs=1e-3)

    (record,) = all_runs(client())
    assert record.info.status == "FINISHED"
    for name in ("step/loss", "train/loss", "val/accuracy", "test/accuracy"):
        points = [(p.step, p.value) for p in client().get_metric_history(record.info.run_id, name)]
        assert sorted(points) == [(step, value) for step, metric, value in curve(entries) if metric == name]


def test_a_stop_file_that_no_rank_saw_before_the_kill_does_not_end_the_resumed_run(
    cifar_exp: Command, started: Start, workplace: Path
) -> None:
    run, cut = [*REPEATABLE, "tracking=none"], workplace / "cut"
    killed_after(started, cut, 2, *run)
    (cut / "stop").touch()
    again = cifar_exp(*run, "hydra.run.dir=cut", "resume=auto")
    assert again.returncode == 0, again.stderr
    assert "cut/stop: removed. It was there before this start" in again.stderr
    assert "training ended early" not in again.stdout
    assert not (cut / "stop").exists()
    assert journal.read(cut)[-1].epoch == 16


def test_a_new_run_keeps_files_of_others_and_removes_a_stop_file(cifar_exp: Command, workplace: Path) -> None:
    folder = workplace / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("old")
    (folder / "stop").touch()
    refused = cifar_exp(*TINY, "tracking=none", "hydra.run.dir=run")
    assert refused.returncode == 2
    assert "run: the folder has config.yaml, which the run would overwrite" in refused.stderr
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"config.yaml": "old", "stop": ""}
    (folder / "config.yaml").rename(folder / "mine.yaml")
    done = cifar_exp(*TINY, "tracking=none", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert "run/stop: removed" in done.stderr
    assert "training ended early" not in done.stdout


def test_auto_finds_the_interrupted_run_and_leaves_no_folder_of_its_own(
    cifar_exp: Command, started: Start, workplace: Path
) -> None:
    run = [*REPEATABLE, "tracking=none"]
    cut = workplace / "outputs" / "cut"
    killed_after(started, cut, 2, *run)
    other = cifar_exp(*run, "seed=1", "train.epochs=1", "resume=auto")  # another configuration: a run of its own
    assert other.returncode == 0, other.stderr
    assert "continues after" not in other.stdout
    why = "outputs/cut was interrupted and had other settings (seed: 0 then, 1 now; train.epochs: 16 then, 1 now)"
    assert f"resume=auto: a new run starts. {why}" in other.stderr
    folders = sorted(path.parent for path in (workplace / "outputs").rglob("run.json"))
    again = cifar_exp(*run, "resume=auto", "progress=lines", "checkpoint.keep=1")
    assert again.returncode == 0, again.stderr
    assert "outputs/cut continues after epoch" in again.stdout
    assert sorted(path.parent for path in (workplace / "outputs").rglob("run.json")) == folders
    assert len(list((workplace / "outputs").rglob("cifar-exp.log"))) == 2
    assert len(list(cut.glob("checkpoints/*.json"))) == 1
    finished = cifar_exp(*run, "resume=outputs/cut")
    assert finished.returncode == 0
    assert "finished before, test accuracy" in finished.stdout


def test_a_damaged_checkpoint_is_passed_over_and_without_a_sound_one_it_is_exit_code_8(
    cifar_exp: Command, workplace: Path
) -> None:
    run = [*REPEATABLE, "tracking=none", "progress=quiet"]
    assert cifar_exp(*run, "hydra.run.dir=whole").returncode == 0
    cut = shutil.copytree(workplace / "whole", workplace / "cut")
    lines = (cut / journal.JOURNAL_FILE).read_text().splitlines(keepends=True)
    (cut / journal.JOURNAL_FILE).write_text("".join(lines[:-2]))  # as if it had been stopped in its last evaluation
    newest = max(cut.glob("checkpoints/*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1])
    again = cifar_exp(*run, "resume=cut")
    assert again.returncode == 0, again.stderr
    assert again.stderr == f"cifar-exp: {newest.relative_to(workplace)}: the checkpoint is damaged and is skipped\n"
    assert curve(journal.read(cut)) == curve(journal.read(workplace / "whole"))

    (cut / journal.JOURNAL_FILE).write_text("".join(lines[:-2]))
    for path in cut.glob("checkpoints/*.pt"):
        path.write_bytes(b"")
    refused = cifar_exp(*run, "resume=cut")
    assert refused.returncode == 8
    assert "all 2 checkpoint(s) are damaged" in refused.stderr
    shutil.rmtree(cut / "checkpoints")
    gone = cifar_exp(*run, "resume=cut")
    assert gone.returncode == 8
    assert "its checkpoints are gone" in gone.stderr
    assert "Traceback" not in refused.stderr + gone.stderr


def test_resume_on_another_device_count_keeps_the_global_batch(cifar_exp: Command, workplace: Path) -> None:
    run = [*TINY, "tracking=none", "devices.oversubscribe=true"]
    assert cifar_exp(*run, "devices.count=2", "hydra.run.dir=two").returncode == 0
    refused = cifar_exp(*run, "devices.count=3", "resume=two", "train.epochs=3")
    assert refused.returncode == 2
    assert "64 images per step, which 3 devices cannot share evenly" in refused.stderr
    one = cifar_exp(*run, "devices.count=1", "resume=two", "train.epochs=3", "optimizer.lr=0.01", "hydra.run.dir=one")
    assert one.returncode == 0, one.stderr
    assert "2 device(s) then, 1 now: 64 images per step in the same order, 64 per device" in one.stdout
    assert "optimizer.lr: 0.1 then, 0.01 now" in one.stdout
    entries = journal.read(workplace / "one")  # a run of its own
    assert [entry.step for entry in entries if "val/accuracy" in entry.metrics] == [3]
    assert journal.last_values(workplace / "one")["lr"] == pytest.approx(0.01 * 64 / 256)


def test_impossible_resume_reports_its_reason(cifar_exp: Command, workplace: Path) -> None:
    run = [*TINY, "tracking=none", "progress=quiet"]
    assert cifar_exp(*run, "hydra.run.dir=done").returncode == 0
    for change, message in {
        "model.width=8": "model.width: the checkpoint was trained with 4",
        "optimizer=adamw": "optimizer._target_: the checkpoint was trained with torch.optim.SGD",
        "train.epochs=1": "train.epochs=1: the checkpoint has 2 epochs already. Set train.epochs=3 or more",
        "resume=nowhere": "resume=nowhere: there is no such run",
    }.items():
        refused = cifar_exp(*run, "resume=done", change)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
    assert not list((workplace / "outputs").rglob("run.json"))
    (workplace / "done" / journal.JOURNAL_FILE).write_text("")
    reseal(newest := max((workplace / "done").glob("checkpoints/*.json")), config_hash="0" * 64)
    foreign = cifar_exp(*run, "resume=done")
    assert foreign.returncode == 2
    assert f"{newest.stem}.pt: it is the checkpoint of a run with other settings (their" in foreign.stderr


def test_other_images_are_refused(cifar_exp: Command, started: Start, workplace: Path) -> None:
    run = [*REPEATABLE, "tracking=none"]
    killed_after(started, workplace / "outputs" / "cut", 1, *run)
    (manifest,) = list(workplace.rglob("checkpoints/*.json"))[:1]
    for path in workplace.rglob("checkpoints/*.json"):
        reseal(path, data_hash="0" * 64)
    refused = cifar_exp(*run, "resume=auto")
    assert refused.returncode == 3
    assert "the images are not those" in refused.stderr
    assert manifest.exists()


def test_an_interrupted_sweep_trains_nothing_twice(cifar_exp: Command, started: Start, workplace: Path) -> None:
    sweep = ["-m", *REPEATABLE, "devices.count=1,2", "train.batch_size=8"]
    process = started(*sweep)
    second = "multirun/*/*/1/checkpoints/*.json"
    wait_for(lambda: list((workplace / "outputs").glob(second)), process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130
    (folder,) = re.findall(r"the same command with resume=(\S+) continues", output)
    assert (workplace / folder / "sweep.json").exists(), "a job's own folder would be where other jobs start"
    (first,) = (workplace / "outputs").glob("multirun/*/*/0/metrics.jsonl")
    trained = first.read_text()

    again = cifar_exp(*sweep, f"resume={folder}")
    assert again.returncode == 0, again.stderr
    assert "the sweep continues" in again.stdout
    assert "0: finished before, test accuracy" in again.stdout
    assert "1 continues after epoch" in again.stdout
    assert first.read_text() == trained
    assert len(list((workplace / "outputs" / "multirun").rglob("run.json"))) == 2
    assert len(list((workplace / "outputs" / "multirun").rglob("speedup.csv"))) == 1
    runs = all_runs(client())
    assert len(runs) == 3
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    assert len({run.data.tags["overrides"] for run in runs if "overrides" in run.data.tags}) == 2
    for run in runs:
        history = client().get_metric_history(run.info.run_id, "train/loss")
        assert len(history) in (0, 16)

    (record,) = (workplace / "outputs").rglob("sweep.json")
    record.write_text(record.read_text().replace('"finished": true', '"finished": false'))  # killed at the very end
    unchanged = cifar_exp(*sweep, "resume=auto")
    assert unchanged.returncode == 0, unchanged.stderr
    assert unchanged.stdout.count("finished before, test accuracy") == 2
    (parent,) = [run for run in all_runs(client()) if PARENT_TAG not in run.data.tags]
    speedup = client().get_metric_history(parent.info.run_id, "speedup")
    assert [point.step for point in speedup] == ([1, 2] if len(own_cores()) > 1 else [])


def test_auto_says_which_overrides_an_interrupted_sweep_had(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with claimed_sweep(Path("outputs/multirun/old"), "auto", ["seed=0,1", "resume=auto"]):
        pass
    assert capsys.readouterr().err == ""
    with claimed_sweep(Path("outputs/multirun/new"), "auto", ["seed=0,1,2"]) as folder:
        assert folder == Path("outputs/multirun/new")
    assert "a new sweep starts. outputs/multirun/old was interrupted and had the overrides seed=0,1. " in (
        capsys.readouterr().err
    )
    end_sweep(workplace / "outputs/multirun/old")
    with claimed_sweep(Path("outputs/multirun/new"), "auto", ["seed=0,1,2"]):
        assert capsys.readouterr().err == ""


def test_other_damaged_runs_are_skipped_and_a_named_one_is_reported(
    cifar_exp: Command, started: Start, workplace: Path
) -> None:
    run = [*REPEATABLE, "tracking=none", "progress=lines"]
    killed_after(started, workplace / "outputs" / "cut", 1, *run)
    (workplace / "outputs" / "torn").mkdir()
    (workplace / "outputs" / "torn" / "run.json").write_text("{")
    again = cifar_exp(*run, "resume=auto")
    assert again.returncode == 0, again.stderr
    assert "outputs/cut continues" in again.stdout
    assert again.stderr.count("outputs/torn: the run cannot be read and is skipped") == 1
    for damaged in ("outputs/torn", "x" * 300):
        refused = cifar_exp(*run, f"resume={damaged}")
        assert refused.returncode in (2, 8)
        assert "Traceback" not in refused.stderr


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_again(cifar_exp: Command, workplace: Path) -> None:
    run = [*REPEATABLE, "tracking=none", "train.epochs=3"]
    assert cifar_exp(*run, "hydra.run.dir=whole").returncode == 0
    cut = shutil.copytree(workplace / "whole", workplace / "cut")
    shutil.rmtree(cut / "checkpoints")
    lines = (cut / journal.JOURNAL_FILE).read_text().splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if "val/accuracy" in line)
    (cut / journal.JOURNAL_FILE).write_text("".join(lines[: first + 1]))
    again = cifar_exp(*run, "hydra.run.dir=cut", "resume=auto", "checkpoint.every=2")
    assert again.returncode == 0, again.stderr
    assert "was stopped before its first checkpoint: it starts again" in again.stdout
    assert curve(journal.read(cut)) == curve(journal.read(workplace / "whole"))
    assert "was stopped before its first checkpoint: it starts again" in next(cut.glob("*.log")).read_text()

    shutil.rmtree(cut / "checkpoints")
    whole = (workplace / "whole" / journal.JOURNAL_FILE).read_text().splitlines(keepends=True)
    (cut / journal.JOURNAL_FILE).write_text("".join(line for line in whole if "time/total_seconds" not in line))
    lost = cifar_exp(*run, "hydra.run.dir=cut", "resume=auto")  # in the third epoch the first one's was on disk
    assert lost.returncode == 8
    assert "its checkpoints are gone" in lost.stderr


def test_a_new_run_that_is_stopped_before_its_first_checkpoint_starts_again_from_the_others(
    cifar_exp: Command, workplace: Path
) -> None:
    run = [*REPEATABLE, "tracking=none"]
    assert cifar_exp(*run, "train.epochs=2", "hydra.run.dir=old").returncode == 0
    longer = [*run, "train.epochs=5"]
    assert cifar_exp(*longer, "resume=old", "hydra.run.dir=whole").returncode == 0
    cut = shutil.copytree(workplace / "whole", workplace / "cut")
    shutil.rmtree(cut / "checkpoints")
    lines = (cut / journal.JOURNAL_FILE).read_text().splitlines(keepends=True)
    (cut / journal.JOURNAL_FILE).write_text(lines[0])
    again = cifar_exp(*longer, "hydra.run.dir=cut", "resume=auto")
    assert again.returncode == 0, again.stderr
    assert "cut starts again from the checkpoint of old after epoch 2" in again.stdout
    assert curve(journal.read(cut)) == curve(journal.read(workplace / "whole"))

    shutil.rmtree(cut / "checkpoints")
    (cut / journal.JOURNAL_FILE).write_text("".join(line for line in lines if "time/total_seconds" not in line))
    lost = cifar_exp(*longer, "hydra.run.dir=cut", "resume=auto")
    assert lost.returncode == 8
    assert "its checkpoints are gone" in lost.stderr
    (cut / journal.JOURNAL_FILE).write_text(lines[0])
    shutil.rmtree(workplace / "old" / "checkpoints")
    gone = cifar_exp(*longer, "hydra.run.dir=cut", "resume=auto")
    assert gone.returncode == 8
    assert "It started from the checkpoint of" in gone.stderr


def test_ema_weights_of_several_ranks_resume_bit_for_bit(cifar_exp: Command, workplace: Path) -> None:
    options = ["train.epochs=4", "train.weight_averaging=0.9", "devices.count=2", "devices.oversubscribe=true"]
    run = [*REPEATABLE, "tracking=none", *options, "checkpoint.keep=9"]
    assert cifar_exp(*run, "hydra.run.dir=whole").returncode == 0
    cut = shutil.copytree(workplace / "whole", workplace / "cut")
    for path in sorted(cut.glob("checkpoints/*"))[4:]:
        path.unlink()
    lines = (cut / journal.JOURNAL_FILE).read_text().splitlines(keepends=True)
    second = [number for number, line in enumerate(lines) if "val/accuracy" in line][1]
    (cut / journal.JOURNAL_FILE).write_text("".join(lines[: second + 1]))
    again = cifar_exp(*run, "hydra.run.dir=cut", "resume=auto")
    assert again.returncode == 0, again.stderr
    assert curve(journal.read(cut)) == curve(journal.read(workplace / "whole"))


def test_resume_with_another_batch_size_keeps_the_place_in_the_schedule(cifar_exp: Command, workplace: Path) -> None:
    run = [*TINY, "tracking=none"]
    assert cifar_exp(*run, "hydra.run.dir=old").returncode == 0
    larger = cifar_exp(*run, "resume=old", "train.batch_size=96", "train.epochs=4", "hydra.run.dir=new")
    assert larger.returncode == 0, larger.stderr
    epochs = [entry for entry in journal.read(workplace / "new") if "val/accuracy" in entry.metrics]
    assert [(entry.epoch, entry.step) for entry in epochs] == [(3, 3), (4, 4)]


def test_sweep_folder_is_not_used_for_another_sweep(cifar_exp: Command, workplace: Path) -> None:
    sweep = ["-m", *TINY, "tracking=none", "seed=1,2", "train.epochs=1", 'hydra.sweep.dir="outputs/it\'s one"']
    first = cifar_exp(*sweep)
    assert first.returncode == 0, first.stderr
    again = cifar_exp(*sweep)
    assert again.returncode == 2
    assert "the folder has a sweep already" in again.stderr
    (folder,) = (workplace / "outputs").glob("it*")
    (record,) = folder.glob("sweep.json")
    record.write_text(record.read_text().replace('"finished": true', '"finished": false'))
    resumed = cifar_exp(*sweep, "resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("finished before, test accuracy") == 2
