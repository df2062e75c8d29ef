"""Held-out images are never trained on and are the same in every run; all ranks decide alike by them."""

import json
import shutil
import subprocess
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional as F

from cifar_exp.config.defaults import conf_dir
from cifar_exp.config.hydra_versions import composing
from cifar_exp.config.reading import read_config
from cifar_exp.data import class_folders
from cifar_exp.data.augment import Identity
from cifar_exp.data.batches import EvaluationBatches, Normalization, TrainBatches
from cifar_exp.data.dataset_files import DatasetFiles, Split
from cifar_exp.data.sources import open_sources
from cifar_exp.data.validation_split import hold_out, split_indices, split_source
from cifar_exp.display.curves import PageFacts
from cifar_exp.display.display import Display
from cifar_exp.errors import ConfigError
from cifar_exp.records import checkpoint, journal
from cifar_exp.records.journal import Entry
from cifar_exp.runs.classifier import Classifier
from cifar_exp.runs.components import build
from cifar_exp.training.early_stopping import EarlyStopping
from cifar_exp.training.metrics import MetricValues
from tests.conftest import TINY, Command
from tests.helpers.configs import composed, default_config
from tests.helpers.defaults import with_defaults
from tests.helpers.image_trees import CPU, SIDE, tree
from tests.helpers.mlflow_runs import all_runs, client
from tests.helpers.runs import curve

folders = with_defaults(class_folders.folders)
Run = subprocess.CompletedProcess[str]


@pytest.mark.parametrize(("images", "count"), [(96, 32), (50, 5), (1000, 1), (1000, 999), (997, 313)])
@pytest.mark.parametrize("classes", [1, 2, 10])
def test_split_covers_the_set_once_with_equal_class_shares(images: int, count: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(0, classes, (images,), generator=generator).square() // classes  # of several frequencies
    rest, kept = split_indices(labels, count)
    assert len(kept) == count
    assert torch.cat([rest, kept]).sort().values.tolist() == list(range(images))
    assert rest.tolist() == rest.sort().values.tolist()
    assert kept.tolist() == kept.sort().values.tolist()
    for label in range(classes):
        share = count / images * int((labels == label).sum())
        assert abs(int((labels[kept] == label).sum()) - share) < 1


def test_split_is_random_and_independent_of_the_global_rng() -> None:
    labels = torch.zeros(1000, dtype=torch.int64)
    torch.manual_seed(1)
    _, kept = split_indices(labels, 500)
    torch.manual_seed(2)
    assert torch.equal(split_indices(labels, 500)[1], kept)
    assert abs(kept.double().mean() - 499.5) < 40  # its standard deviation is 9
    gaps = kept.diff()
    assert gaps.unique().numel() > 5  # neither a stretch of the set nor every other image


@pytest.mark.parametrize("choice", ["device", "host", "loader"])
def test_subset_selects_the_given_indices_in_every_residency(tmp_path: Path, choice: Any) -> None:
    whole = folders(tree(tmp_path)).load("train")
    size = SIDE if choice == "loader" else None
    files = hold_out(folders(tmp_path, residency=choice, image_size=size, workers=0), 0.25)
    assert (files.train_count, files.validation_count) == (20, 6)
    rest, kept = split_indices(whole.labels, 6)
    with open_sources(files, CPU, threads=1) as (train, _):
        trained, validated = split_source(train, files)
        assert validated is not None
        for source, places in ((trained, rest), (validated, kept)):
            expected = Split(whole.images[places].contiguous(memory_format=torch.channels_last), whole.labels[places])
            assert len(source) == len(places)
            assert (source.image_size, source.device) == ((SIDE, SIDE), CPU)
            both: list[list[Any]] = []
            for images in (source, expected):
                batches = TrainBatches(images, Identity(), Normalization(), 3, 1, 2, 2)
                evaluation = EvaluationBatches(images, Normalization(), 1, 2, 2)
                both.append([*batches.epoch(1), *batches.epoch(2), *evaluation])
            assert len(both[0]) == len(both[1]) > 2
            for (images, labels), (same_images, same_labels) in zip(*both, strict=True):
                assert torch.equal(images, same_images)
                assert torch.equal(labels, same_labels)


def test_dataset_is_not_wrapped_without_a_validation_split(tmp_path: Path) -> None:
    files = hold_out(folders(tree(tmp_path)), 0.0)
    with ExitStack() as closing:
        train, _ = closing.enter_context(open_sources(files, CPU, threads=1))
        assert split_source(train, files) == (train, None)


@pytest.mark.parametrize(
    ("share", "count", "usual"), [(0.001, 96, "0.1"), (0.999, 96, "0.1"), (0.4, 1, "0"), (0.9, 3, "0")]
)
def test_validation_share_that_leaves_no_images_is_refused(share: float, count: int, usual: str) -> None:
    files = DatasetFiles(Path(), ("a",), count, 1, (1, 1), (0.0,) * 3, (1.0,) * 3, "")
    with pytest.raises(ConfigError) as refusal:
        hold_out(files, share)
    assert f"data.validation={share}: it holds out " in str(refusal.value)
    assert f"of {count} training images," in str(refusal.value)
    assert str(refusal.value).endswith(f"Set data.validation={usual}")
    made = hold_out(files, float(usual))
    assert made.train_count + made.validation_count == count
    assert made.train_count > 0


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.validation=1.0", ("data.validation=1.0", "less than 1")),
        ("data.validation=-0.1", ("data.validation=-0.1", "0.0 or more", "Set data.validation=0")),
        ("data.validation=tenth", ("data.validation=tenth", "a number", "Set data.validation=0.0")),
        ("early_stopping.patience=0", ("early_stopping.patience=0", "1 or more", "Set early_stopping.patience=1")),
        ("early_stopping.metric=loss", ("early_stopping.metric=loss", "val/loss or val/accuracy")),
        ("early_stopping.min_delta=-1", ("early_stopping.min_delta=-1", "0.0 or more")),
        ("+early_stopping.patiense=1", ("early_stopping.patiense", "Did you mean early_stopping.patience?")),
    ],
)
def test_a_wrong_setting_is_refused(override: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refusal:
        read_config(composed(override))
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize("choice", ["cifar10", "folders", "synthetic"])
def test_data_validation_works_for_every_dataset_and_is_not_passed_to_it(choice: str) -> None:
    config = read_config(composed(f"data={choice}", "data.validation=0.2", "early_stopping.metric=val/accuracy"))
    assert config.validation == 0.2
    assert config.early_stopping.metric == "val/accuracy"
    assert "validation" not in build(config).dataset.keywords  # type: ignore[attr-defined]
    assert read_config(composed(f"data={choice}")).validation == 0


def test_a_users_own_dataset_has_the_setting_too_and_may_choose_its_value(workplace: Path) -> None:
    (workplace / "my_data.py").write_text("def mine(root): return root\n")
    (workplace / "conf" / "data").mkdir(parents=True)
    (workplace / "conf" / "data" / "mine.yaml").write_text("_target_: my_data.mine\nroot: here\n")
    (workplace / "conf" / "data" / "apart.yaml").write_text("_target_: my_data.mine\nroot: here\nvalidation: 0.3\n")
    with composing(conf_dir()):
        for words, expected in ((["data=mine"], 0), (["data=mine", "data.validation=0.2"], 0.2), (["data=apart"], 0.3)):
            search = [f"hydra.searchpath=[file://{workplace}/conf]", "trusted_modules=[my_data]"]
            config = read_config(compose("config", [*search, *words]))
            assert config.validation == expected
            assert build(config).dataset.keywords == {"root": "here"}  # type: ignore[attr-defined]


def stopping_after(values: list[float], **settings: Any) -> tuple[EarlyStopping, int]:
    """Early stopping that was told ``values`` until it was over, ten steps an epoch; the last epoch."""
    made = EarlyStopping(replace(default_config().early_stopping, **settings))
    for epoch, value in enumerate(values, 1):
        accuracy = settings.get("metric") == "val/accuracy"
        made.update(MetricValues(*((9.0, value) if accuracy else (value, 0.9)), count=5), epoch, 10 * epoch)
        if made.is_over:
            return made, epoch
    return made, len(values)


LOSSES = [1.0, 0.8, 0.9, 0.85, 0.7, 0.75, 0.72, 0.71, 0.6]


@pytest.mark.parametrize(
    ("settings", "values", "best_epoch", "last_epoch", "is_over"),
    [
        ({"patience": 1}, LOSSES, 2, 3, True),
        ({"patience": 2}, LOSSES, 2, 4, True),
        ({"patience": 3}, LOSSES, 5, 8, True),
        ({"patience": 4}, LOSSES, 9, 9, False),
        ({}, LOSSES, 9, 9, False),
        ({"patience": 2}, [1.0, 1.0, 1.0, 0.5], 1, 3, True),  # as good is not better, and the first one is the best
        ({"patience": 2, "metric": "val/accuracy"}, [0.5, 0.6, 0.4, 0.55, 0.9], 2, 4, True),
        # Less than min_delta at a time counts once it adds up; the best is the best whatever it is better by.
        ({"patience": 2, "min_delta": 0.1}, [1.0, 0.95, 0.89, 0.85, 0.8, 0.1], 5, 5, True),
        ({"patience": 2, "min_delta": 0.1}, [1.0, 0.95, 0.89, 0.85, 0.78, 0.1], 6, 6, False),
    ],
)
def test_training_ends_when_patience_runs_out(
    settings: dict[str, Any], values: list[float], best_epoch: int, last_epoch: int, is_over: bool
) -> None:
    made, last = stopping_after(values, **settings)
    assert (made.best_epoch, last, made.is_over) == (best_epoch, last_epoch, is_over)
    assert made.best == values[best_epoch - 1]
    assert made.best_step == 10 * best_epoch


def test_early_stopping_state_is_restored_and_its_settings_are_new() -> None:
    (whole, _), (first, _) = stopping_after(LOSSES, patience=3), stopping_after(LOSSES[:6], patience=3)
    again = EarlyStopping(replace(default_config().early_stopping, patience=3))
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for epoch in (7, 8):
        assert not again.is_over
        again.update(MetricValues(LOSSES[epoch - 1], 0.9, 5), epoch, 10 * epoch)
    assert again == whole


# The network tells each image that it sees apart, as a hash; a third of 96 images kept apart leaves two whole batches.
SPY = """
import hashlib, os
from torch import nn

class Spy(nn.Linear):
    def forward(self, images):
        name = f"{'trained' if self.training else 'evaluated'}-{os.environ.get('RANK')}"
        with open(name, "a") as file:
            for image in images.detach().contiguous():
                print(hashlib.sha256(image.numpy().tobytes()).hexdigest(), file=file)
        return super().forward(images.flatten(1))

def model(*, num_classes, width, depth):
    return Spy(3072, num_classes)
"""
SPIED = [
    *(*TINY, "model._target_=spy.model", "trusted_modules=[spy]", "augment=none", "train.normalization=none"),
    *("optimizer.lr=1e-8", "data.validation=0.3333", "train.epochs=4", "tracking=none", "checkpoint.keep=9"),
    *("train.deterministic=true", "train.precision=fp32", "devices.oversubscribe=true"),
]


def seen(workplace: Path, what: str) -> list[str]:
    """Hashes of the images that the ranks were trained on."""
    lines = [line for path in sorted(workplace.glob(f"{what}-?")) for line in path.read_text().split()]
    for path in workplace.glob(f"{what}-?"):
        path.unlink()
    return lines


def test_training_and_validation_images_stay_disjoint_on_all_ranks_and_after_a_resume(
    cifar_exp: Command, workplace: Path
) -> None:
    (workplace / "spy.py").write_text(SPY)
    sets = {}

    def look(name: str, done: Run, epochs: int) -> None:
        assert done.returncode == 0, done.stderr
        trained, evaluated = seen(workplace, "trained"), seen(workplace, "evaluated")
        often = {image: evaluated.count(image) for image in evaluated}
        kept = {image for image, count in often.items() if count == epochs}
        tests = {image for image, count in often.items() if count < epochs}
        assert (len(set(trained)), len(kept), len(tests)) == (64, 32, 33)
        assert not set(trained) & set(often)
        sets[name] = (set(trained), kept, tests)

    one = cifar_exp(*SPIED, "train.batch_size=32", "hydra.run.dir=one", "seed=1")
    look("one", one, 4)
    plan = " ".join(one.stdout.split())
    assert "64 in 10 classes (32 in the validation split)" in plan
    assert "2 (0 images dropped)" in plan
    assert "32 training images after each epoch" in plan
    assert "33 images at the end" in plan
    two = cifar_exp(*SPIED, "train.batch_size=16", "devices.count=2", "hydra.run.dir=two", "seed=2")
    look("two", two, 4)

    whole = journal.read(workplace / "one")
    last = journal.last_values(workplace / "one")
    assert last["test/count"] == 33
    assert "stopped_epoch" not in last
    cut = workplace / "one"
    lines = (cut / journal.JOURNAL_FILE).read_text().splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if "val/accuracy" in line)
    (cut / journal.JOURNAL_FILE).write_text("".join(lines[: first + 1]))
    for path in sorted(cut.glob("checkpoints/*"))[2:]:
        path.unlink()
    again = cifar_exp(*SPIED, "train.batch_size=32", "hydra.run.dir=one", "seed=1", "resume=auto")
    look("again", again, 3)
    assert sets["one"] == sets["two"] == sets["again"]
    assert curve(journal.read(cut)) == curve(whole)

    changed = cifar_exp(*SPIED, "resume=one", "data.validation=0.5", "train.epochs=9", "hydra.run.dir=other")
    assert changed.returncode == 2
    assert "the checkpoint was trained with 0.3333" in changed.stderr
    assert "Set data.validation=0.3333" in changed.stderr


# Logits that no image bears on: their loss falls while the rate is positive and rises when it is negative.
BIAS = """
import torch
from torch import nn

class Bias(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.bias.data[0] = 5.0

    def forward(self, images):
        return self.bias.expand(len(images), -1)

def model(*, num_classes, width, depth):
    return Bias(num_classes)

def three_epochs_down(step, steps_per_epoch, epochs, drop_factor, drop_period):
    return 1.0 if step < 3 * steps_per_epoch else 2.0

class Climbing(torch.optim.SGD):
    "Climbs where the schedule gives 2."
    def step(self, closure=None):
        for group in self.param_groups:
            if group["lr"] > 0.2:
                group["lr"] = -group["lr"] / 2
        super().step()
"""
DOWN_AND_UP = [
    *(*TINY, "model._target_=bias.model", "schedule._target_=bias.three_epochs_down", "trusted_modules=[bias]"),
    "optimizer._target_=bias.Climbing",
    *("optimizer.lr=1", "train.epochs=20", "early_stopping.patience=2", "train.precision=fp32"),
    *("train.deterministic=true", "devices.oversubscribe=true"),
]


def validation_losses(run_dir: Path) -> list[float]:
    return [entry.metrics["val/loss"] for entry in journal.read(run_dir) if "val/loss" in entry.metrics]


def loss_on_the_test_set(saved: checkpoint.Checkpoint, workplace: Path) -> float:
    """What a network of `bias.model` comes to on the test set."""
    labels = torch.from_numpy(np.load(next(workplace.rglob("test_labels.npy"))))
    return float(F.cross_entropy(saved.model["bias"].expand(len(labels), -1), labels))


def step_files(run_dir: Path) -> list[str]:
    return sorted(path.stem for path in run_dir.glob("checkpoints/*.json"))


def test_early_stopping_saves_the_best_network_and_is_the_same_after_a_resume(
    cifar_exp: Command, workplace: Path
) -> None:
    """Two ranks; the third epoch is the best, the fifth the last. The best is no multiple of checkpoint.every."""
    (workplace / "bias.py").write_text(BIAS)
    run = [*DOWN_AND_UP, "data.validation=0.3333", "devices.count=2", "train.batch_size=16"]
    done = cifar_exp(*run, "checkpoint.every=4", "hydra.run.dir=outputs/whole")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    whole = workplace / "outputs" / "whole"
    losses = validation_losses(whole)
    assert len(losses) == 5
    assert losses[:3] == sorted(losses[:3], reverse=True)
    assert losses[2] < losses[3] < losses[4]
    last = journal.last_values(whole)
    assert (last["best_epoch"], last["stopped_epoch"], last["epoch"]) == (3, 5, 5)
    assert step_files(whole) == ["step-00000006", "step-00000008", "step-00000010"]

    best, newest = checkpoint.best(whole, pytest.fail), checkpoint.newest(whole, pytest.fail)
    assert best is not None
    assert (best.training["epoch"], newest.training["epoch"]) == (3, 5)
    assert last["test/loss_best"] == pytest.approx(loss_on_the_test_set(best, workplace), rel=1e-6)
    assert last["test/loss"] == pytest.approx(loss_on_the_test_set(newest, workplace), rel=1e-6)
    assert last["test/loss_best"] < last["test/loss"]
    assert last["test/count"] == 33
    manifest = json.loads((whole / "checkpoints" / "step-00000006.json").read_text())
    assert (manifest["best_step"], manifest["best_value"]) == (6, losses[2])
    assert torch.equal(load_file(whole / "model.safetensors")["bias"], best.model["bias"])

    message = "early stopping: training ended after epoch 5 of 20: 2 epochs in a row without a lower val/loss"
    assert message in done.stdout
    assert message in (whole / "cifar-exp.log").read_text()
    assert "best val/loss after epoch 3: test accuracy" in done.stdout
    page = (whole / "progress.html").read_text()
    assert "5 of 5 epochs done" in page
    assert "5 of 20: early stopping" in page
    (record,) = all_runs(client())
    assert record.info.status == "FINISHED"
    assert record.data.metrics["stopped_epoch"] == 5
    assert record.data.metrics["test/loss_best"] == last["test/loss_best"]

    Image.new("RGB", (32, 32)).save(workplace / "black.png")
    for words, saved in (([], best), (["checkpoint=last"], newest)):
        trusted = "trusted_modules=[bias]"
        predicted = cifar_exp("predict", "outputs/whole", *words, trusted, "--json", "black.png")
        assert predicted.returncode == 0, predicted.stderr
        expected = float(saved.model["bias"].softmax(0).max())
        assert json.loads(predicted.stdout)["probability"] == pytest.approx(expected, abs=1e-4)

    lines = (whole / journal.JOURNAL_FILE).read_text().splitlines(keepends=True)
    fourth = [number for number, line in enumerate(lines) if "val/accuracy" in line][3]
    # As if it had been stopped after the fourth epoch, and in its last evaluation.
    for name, kept, files in (("early", fourth + 1, 2), ("late", -2, 3)):
        cut = shutil.copytree(whole, workplace / "outputs" / name)
        (cut / journal.JOURNAL_FILE).write_text("".join(lines[:kept]))
        for path in sorted(cut.glob("checkpoints/*"))[2 * files :]:
            path.unlink()
        again = cifar_exp(*run, "checkpoint.every=4", f"hydra.run.dir={cut}", "resume=auto", "tracking=none")
        assert again.returncode == 0, again.stderr
        assert curve(journal.read(cut)) == curve(journal.read(whole))
        assert step_files(cut) == step_files(whole)


@pytest.mark.parametrize(("status", "word"), [("FINISHED", "finished"), ("KILLED", "stopped")])
def test_figure_ends_at_the_last_trained_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: Any, word: str
) -> None:
    drawn: list[PageFacts] = []
    monkeypatch.setattr(
        "cifar_exp.display.training_figure.draw_training", lambda _entries, facts, _path: drawn.append(facts)
    )
    facts = PageFacts("a run", "starting", 20, 10, [(15, 0.1)], {"devices": "one", "epochs": "20 (200 steps)"})
    display = Display(tmp_path, facts, "quiet", Console(quiet=True), started=0.0)
    display.open()
    display.write([Entry(50, 5, 1.0, {"val/accuracy": 0.5}), Entry(50, 5, 2.0, {"stopped_epoch": 5})])
    display.close(status)
    details = {"devices": "one", "epochs": "5 of 20: early stopping"}
    why = "early stopping" if status == "FINISHED" else ""
    assert drawn == [replace(facts, status=word, epochs=5, details=details, ended_early=why)]
    assert "50 of 50 iterations" in (tmp_path / "progress.html").read_text()


def test_early_stopping_without_validation_split_uses_the_test_set_and_warns(
    cifar_exp: Command, workplace: Path
) -> None:
    (workplace / "bias.py").write_text(BIAS)
    options = ["tracking=none", "progress=quiet", "checkpoint.keep=1", "hydra.run.dir=run"]
    done = cifar_exp(*DOWN_AND_UP, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("cifar-exp: early_stopping.patience=2: there is no validation split")
    assert len(done.stderr.splitlines()) == 1
    assert "Set data.validation=0.1" in (workplace / "run" / "cifar-exp.log").read_text()
    losses, last = validation_losses(workplace / "run"), journal.last_values(workplace / "run")
    assert (len(losses), last["stopped_epoch"], last["best_epoch"]) == (5, 5, 3)
    assert last["test/loss"] == losses[-1]
    assert "test/loss_best" not in last
    assert step_files(workplace / "run") == ["step-00000015"]
    saved = checkpoint.newest(workplace / "run", pytest.fail)
    assert torch.equal(load_file(workplace / "run" / "model.safetensors")["bias"], saved.model["bias"])

    with pytest.raises(ConfigError, match=r"checkpoint=best: run has no best checkpoint"):
        Classifier.of_run(Path("run"), "best")
    refused = cifar_exp("predict", "run", "checkpoint=newest", "black.png")
    assert refused.returncode == 2
    assert "checkpoint=newest: it must be best or last. Set checkpoint=best" in refused.stderr


def test_validation_share_that_leaves_no_batch_is_refused(cifar_exp: Command) -> None:
    """One of 96 images is left, too few for a batch of 32. The message has the largest valid share."""
    done = cifar_exp(*TINY, "data.validation=0.99", "tracking=none")
    assert done.returncode == 2
    assert "a step takes 32 images on 1 device(s), but the training set has 1" in done.stderr
    assert "without the validation split of data.validation=0.99" in done.stderr
    assert "Set train.batch_size=1 or less, or a smaller data.validation" in done.stderr
    assert len(done.stderr.splitlines()) == 1
