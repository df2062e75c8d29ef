"""One run, from the command line to its run folder and its MLflow run."""

import json
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from cifar_exp.data.batches import resized
from cifar_exp.distributed.rank_times import by_rank, training_seconds
from cifar_exp.models.build import parameter_count
from cifar_exp.models.networks import convnet
from cifar_exp.models.speednet import patches_of
from cifar_exp.records import journal
from cifar_exp.runs.classifier import Classifier
from cifar_exp.system.host import own_cores
from cifar_exp.tracking.mlflow_tracker import MLflowTracker
from tests.conftest import TINY, Command, the_run
from tests.helpers.image_trees import REAL_IMAGES
from tests.helpers.mlflow_runs import all_runs, client


def test_run_leaves_its_files_and_a_correct_mlflow_run(cifar_exp: Command, workplace: Path) -> None:
    done = cifar_exp(*TINY, "devices.count=2", "seed=3", "train.batch_size=16")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    run_dir = the_run(workplace)

    entries = journal.read(run_dir)
    assert [entry.step for entry in entries] == sorted(entry.step for entry in entries)
    epochs = [entry for entry in entries if "val/accuracy" in entry.metrics]
    assert [entry.step for entry in epochs] == [3, 6]
    expected = "train/loss train/accuracy val/loss val/accuracy lr epoch images_per_second time/epoch_seconds"
    assert set(epochs[0].metrics) == set(expected.split())
    last = journal.last_values(run_dir)
    assert last["test/count"] == 33
    assert last["test/accuracy"] == epochs[-1].metrics["val/accuracy"]
    assert last["lr"] == pytest.approx(0.1 * 32 / 256)
    assert last["machine/other_load"] >= 0
    assert (last["steady_steps"], last["steady_blocks"]) == (5, 5)
    assert "images/s (CPU-simulated devices) (over 5 steps in 5 blocks of train.log_every: rough)" in done.stdout
    split = {name: value for name, value in last.items() if name.startswith("time_split/")}
    names = {"startup", "compile", "data", "step", "communication", "evaluation", "checkpoint", "tracking", "other"}
    assert set(split) == {f"time_split/{name}" for name in names}
    assert sum(split.values()) == pytest.approx(last["time/total_seconds"], abs=1e-3)
    assert min(split.values()) >= 0
    ranks = by_rank(last)
    assert [round(training_seconds(rank), 3) for rank in ranks[:1]] == [round(last["time/train_seconds"], 3)]
    assert len(ranks) == 2
    assert sum(rank["last_share"] for rank in ranks) == pytest.approx(1)
    gradients = parameter_count(convnet(num_classes=10, width=4, depth=1))  # of 4 bytes; two ranks send each once
    assert last["communication/bytes_per_step"] == 4 * gradients
    assert last["communication/link_bytes_per_second"] > 0
    for name in ("config.yaml", "progress.html", "training.png", "checkpoints/step-00000006.pt"):
        assert (run_dir / name).stat().st_size > 0

    (run,) = all_runs(client())
    assert run.info.status == "FINISHED"
    assert run.data.params["model.width"] == "4"
    assert run.data.params["seed"] == "3"
    assert (run.data.tags["devices"], run.data.tags["accelerator"]) == ("2", "cpu")
    assert run.data.tags["machine.cores"] == str(len(own_cores()))
    assert run.data.metrics == pytest.approx(last, nan_ok=True)
    history = client().get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(e.step, e.metrics["train/loss"]) for e in epochs]
    kept = {artifact.path for artifact in client().list_artifacts(run.info.run_id)}
    assert kept == {"config.yaml", "progress.html", "training.png", "metrics.jsonl", "model.safetensors"}
    assert str(workplace / "outputs") in run.info.artifact_uri
    assert not (workplace / "mlruns").exists()

    hint = f"mlflow ui --backend-store-uri sqlite:///{workplace / 'outputs' / 'mlflow.db'}"
    assert hint in done.stdout
    plan = done.stdout
    assert "16 per device, 32 in all" in plan
    assert "3 (0 images dropped)" in plan

    images = sorted(workplace.rglob("*.png"))
    predicted = cifar_exp("predict", "latest", "--json", str(images[0]))
    assert predicted.returncode == 0, predicted.stderr
    answer = json.loads(predicted.stdout)
    assert answer["image"] == str(images[0])
    assert 0 < answer["probability"] <= 1
    by_id = cifar_exp("predict", run.info.run_id, "--json", str(images[0]))
    assert by_id.stdout == predicted.stdout


def test_the_same_seed_gives_the_same_losses_and_another_does_not(cifar_exp: Command, workplace: Path) -> None:
    losses = []
    for number, seed in enumerate((5, 5, 6)):
        options = f"tracking=none progress=quiet train.precision=fp32 seed={seed} hydra.run.dir=out{number}"
        done = cifar_exp(*TINY, *options.split())
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        entries = journal.read(workplace / f"out{number}")
        losses.append([entry.metrics["step/loss"] for entry in entries if "step/loss" in entry.metrics])
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_speed_recipe_restores_whitening_and_reports_mirrored_accuracy(
    cifar_exp: Command, workplace: Path, ranks: int
) -> None:
    """Both accuracies are those of the saved network, evaluated here; it was trained at 16, 16 and 24 pixels."""
    small = [word for word in TINY if not word.startswith(("model.", "devices.count", "train.epochs"))]
    changes = ["model.widths=[8,8,8]", "train.epochs=3", "train.image_scales=[0.5,0.5,0.75]", "train.precision=fp32"]
    evaluation = ["train.mirrored_evaluation=true", "devices.oversubscribe=true", f"devices.count={ranks}"]
    done = cifar_exp("experiment=speedrun", *small, *changes, *evaluation, "tracking=none")
    assert done.returncode == 0, done.stderr
    last = journal.last_values(the_run(workplace))
    classifier = Classifier.of_run(the_run(workplace))
    splits = [next(workplace.rglob(f"test_{kind}.npy")) for kind in ("images", "labels")]
    images, labels = (torch.from_numpy(np.load(path)) for path in splits)
    images = images.permute(0, 3, 1, 2)  # they lie channels-last
    assert classifier.image_size == (24, 24)  # what predict resizes pictures to
    with torch.inference_mode():
        small = resized(classifier.normalization(images), 0.75)
        logits, mirrored = classifier.model(small), classifier.model(small.flip(3))
    for name, outputs in {"test/accuracy": logits, "test/accuracy_mirrored": logits + mirrored}.items():
        assert last[name] == pytest.approx(float((outputs.argmax(1) == labels).float().mean()), abs=1e-6)
    whitening = classifier.model.get_submodule("0")
    train_images = torch.from_numpy(np.load(next(workplace.rglob("train_images.npy")))).permute(0, 3, 1, 2)
    patches = patches_of(classifier.normalization(train_images), 2)
    outputs = patches @ whitening.get_parameter("weight").flatten(1)[:12].T
    torch.testing.assert_close(outputs.square().mean(0)[-6:], torch.ones(6), atol=0.02, rtol=0)


def test_image_scale_too_small_for_the_network_is_refused_with_its_setting(
    cifar_exp: Command,
) -> None:
    done = cifar_exp(*TINY, "train.image_scales=[0.01]", "tracking=none")
    assert done.returncode == 2
    assert "train.image_scales: at scale 0.01 the images are too small for this network" in done.stderr
    assert "Traceback" not in done.stderr


def test_tracker_failure_is_exit_code_5_and_training_finishes(cifar_exp: Command, workplace: Path) -> None:
    (workplace / "broken.db").write_text("this is no database")
    done = cifar_exp(*TINY, "tracking.uri=sqlite:///broken.db")
    assert done.returncode == 5
    assert "tracking.uri" in done.stderr
    assert "metrics.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
    assert journal.last_values(the_run(workplace))["test/count"] == 33


def test_invalid_images_are_exit_code_3_and_leave_no_files(cifar_exp: Command, workplace: Path) -> None:
    """The image folders exist, so the error comes after the run folder was created."""
    for split in ("train", "test"):
        (workplace / "pictures" / split / "ant").mkdir(parents=True)
    done = cifar_exp("data=folders", "data.root=pictures", "devices=cpu")
    assert done.returncode == 3
    assert "data.root=pictures" in done.stderr
    assert "Traceback" not in done.stderr
    assert all_runs(client()) == []
    assert [path.name for path in (workplace / "outputs").iterdir()] == ["mlflow.db"]


def test_a_secret_in_an_address_is_not_recorded() -> None:
    assert "secret" not in MLflowTracker(uri="http://user:secret@host:5000").hint()


def test_mlflow_is_the_version_that_the_contract_names() -> None:
    major, minor = map(int, mlflow.__version__.split(".")[:2])
    assert (3, 17) <= (major, minor) < (4, 0)


@pytest.mark.skipif(not (REAL_IMAGES / "train").is_dir(), reason=f"no images in {REAL_IMAGES} (set CIFAR_EXP_IMAGES)")
def test_a_small_network_learns_the_real_images_in_an_epoch(cifar_exp: Command, workplace: Path) -> None:
    small = ["model.width=8", "model.depth=1", "train.epochs=1", "devices=cpu", "devices.count=1", "tracking=none"]
    done = cifar_exp("data=folders", f"data.root={REAL_IMAGES}", *small)  # decoded once, as for a user
    assert done.returncode == 0, done.stderr
    assert "50,000 in 10 classes" in done.stdout
    last = journal.last_values(the_run(workplace))
    assert last["test/count"] == 10_000
    assert last["test/accuracy"] > 0.35  # 0.1 is chance
