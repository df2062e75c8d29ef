"""Parity is measured with the components of a real run; it holds if they are right, and fails if one is wrong."""

import json
import re
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cifar_exp.cli.verify import configurations
from cifar_exp.errors import ConfigError, MachineError
from cifar_exp.parity.checks import Check, compared, relative_difference, tolerances
from cifar_exp.parity.digests import digests
from cifar_exp.parity.measure import Measurement
from cifar_exp.parity.report import ParityReport, ParityResult
from cifar_exp.system import host
from cifar_exp.training.metrics import MetricValues
from cifar_exp.training.plan import Plan
from tests.conftest import Command, environment
from tests.helpers.marks import linux
from tests.helpers.processes import answers_signals, wait_for

SMALL = [
    *("data=synthetic", "data.train_count=100", "data.test_count=33", "train.batch_size=8", "train.epochs=2"),
    *("model.width=4", "model.depth=1", "devices=cpu", "devices.oversubscribe=true"),
]


def report(folder: Path) -> dict[str, Any]:
    """The only one under ``folder``/outputs."""
    (path,) = (folder / "outputs").rglob("parity.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def failed(result: dict[str, Any]) -> set[str]:
    return {check["name"] for check in result["checks"] if not check["holds"]}


@pytest.mark.usefixtures("no_store")
def test_several_ranks_compute_what_one_rank_computes(cifar_exp: Command, workplace: Path) -> None:
    """Every check's figure on 1, 2 and 4 ranks; what is written, where, and for whom."""
    done = cifar_exp("verify", *SMALL, "devices.count=1,2,4")
    assert done.returncode == 0, done.stderr
    assert "1, 2 and 4 ranks compute what one rank computes: outputs/" in done.stdout
    content = report(workplace)
    assert content["holds"] is True
    assert content["precision"] == "fp32"
    assert content["settings"]["train"]["deterministic"] is True
    assert [result["ranks"] for result in content["results"]] == [1, 2, 4]
    for result in content["results"]:
        ranks = result["ranks"]
        found = {check["name"]: check for check in result["checks"]}
        assert list(found) == [
            *("micro-batches that differ in a bit", "images doubled or foreign", "images left out"),
            *("gradient of step 1", "gradient of step 2", "gradient of step 3", "loss of steps 1 to 3"),
            *("parameters after steps 1 to 3", "ranks with other parameters"),
            *("images missing, doubled or misplaced", "images counted", "accuracy", "loss"),
        ]
        assert failed(result) == set()
        dropped = 100 % (8 * ranks)
        assert found["micro-batches that differ in a bit"]["found"] == f"0 of {(100 - dropped) // 8}"
        assert found["images left out"]["found"] == f"{dropped} of 100"
        assert found["images left out"]["wanted"] == f"{dropped}"
        assert found["images counted"]["found"] == "33"
        accuracy = f"{result['evaluated']['one_rank']['accuracy']:.4f}"
        assert found["accuracy"]["detail"] == f"{accuracy}, one rank {accuracy}"
        assert all(check["measured"] < 1e-6 for name, check in found.items() if name.startswith("gradient"))
        assert result["learning_rates"] == pytest.approx([0.1 * 8 * ranks / 256] * 3)
        assert result["losses"]["ranks"] == pytest.approx(result["losses"]["one_rank"], rel=1e-6)
        assert result["parameters_sha256"]["ranks"] == ranks * [result["parameters_sha256"]["ranks"][0]]
        assert len({*result["parameters_sha256"]["one_rank"]}) == len(result["losses"]["ranks"]) == 3
        assert result["epoch_sha256"]["ranks"] == result["epoch_sha256"]["one_rank"]
    one, _, four = content["results"]
    assert one["parameters_sha256"]["ranks"] == [one["parameters_sha256"]["one_rank"]]
    assert one["losses"]["ranks"] != four["losses"]["ranks"]  # another global batch
    (page,) = (workplace / "outputs").rglob("parity.md")
    text = page.read_text()
    for part in ("# Do N ranks compute", "**1, 2 and 4 ranks compute what one rank computes.**", "| check | must be |"):
        assert part in text
    assert text.count("| gradient of step 1 | <= 1e-05 | 0, holds |") == 1
    assert stat.S_IMODE(page.parent.stat().st_mode) == 0o700
    assert not list(workplace.rglob("*.db"))
    assert not list(workplace.rglob("metrics.jsonl"))


@pytest.mark.parametrize(
    "words",
    [
        ("train.scaling=strong", "train.batch_size=32", "train.accumulate=2", "data.validation=0.25"),
        ("train.batch_norm=synchronized", "train.batch_size=20", "devices.count=3", "train.epochs=3"),
        ("train.batch_norm=synchronized", "train.batch_size=32", "train.scaling=strong"),
        ("experiment=speedrun", "train.batch_size=32", "model.widths=[4,8,8]", "train.weight_averaging=0.9"),
        ("optimizer=adamw", "train.precision=bf16", "devices.count=3", "train.epochs=1", "train.batch_size=20"),
    ],
    ids=[
        "micro-batches and images kept apart",
        "statistics of three ranks",
        "of one batch",
        "whitening, Muon, small images first",
        "one step, bf16, three ranks",
    ],
)
def test_parity_check_passes_for_all_settings_that_change_a_step(
    cifar_exp: Command, workplace: Path, words: tuple[str, ...]
) -> None:
    base = [word for word in SMALL if not (word.startswith("model.") and "experiment=speedrun" in words)]
    done = cifar_exp("verify", *base, "devices.count=2", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = report(workplace)["results"]
    assert len(result["losses"]["ranks"]) == (1 if "train.epochs=1" in words else 3)
    if "train.accumulate=2" in words:
        assert (result["per_device_batch_size"], result["micro_batches_a_rank"]) == (8, 2)
        assert (result["global_batch_size"], result["dropped_images"]) == (32, 75 % 32)


# Faults in the parts of a run, as the ranks import them with the network; one rank alone has none of them.
FAULTS = {
    "ranks draw the same images": (
        "from dataclasses import replace\n"
        "from cifar_exp.data.batches import TrainBatches\n"
        "honest = TrainBatches._parts\n"
        "TrainBatches._parts = lambda self, steps: honest(replace(self, rank=0), steps)\n",
        {"micro-batches that differ in a bit", "images doubled or foreign", "images left out", "gradient of step 1"},
    ),
    "gradients are added up and not averaged": (
        "import torch.distributed as dist\n"
        "from cifar_exp.distributed import data_parallel as averaging\n"
        "honest = averaging._average_and_measure\n"
        "def summed(communication, bucket):\n"
        "    return honest(communication, bucket).then(lambda done: done.value() * dist.get_world_size())\n"
        "averaging._average_and_measure = summed\n",
        {"gradient of step 1", "gradient of step 2", "gradient of step 3", "parameters after steps 1 to 3"},
    ),
    "ranks train each by itself": (
        "from cifar_exp.distributed.data_parallel import Communication\n"
        "from cifar_exp.worker import training_setup\n"
        "training_setup.data_parallel.data_parallel = lambda model, world, **_: (model, Communication())\n",
        {"gradient of step 1", "parameters after steps 1 to 3", "ranks with other parameters"},
    ),
    "statistics stay each rank's own": (
        "from cifar_exp.worker import training_setup\n"
        "training_setup.synchronize_layers = lambda model, device: model\n",
        {"loss of steps 1 to 3"},
    ),
    "shards that are evaluated are filled up": (
        "from cifar_exp.data import batches\n"
        "def filled(count, rank, world_size):\n"
        "    share = -(-count // world_size)\n"
        "    start = min(rank * share, count - share)\n"
        "    return range(start, start + share)\n"
        "batches.shard = filled\n",
        {"images missing, doubled or misplaced", "images counted"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_injected_fault_fails_its_check(cifar_exp: Command, workplace: Path, fault: str) -> None:
    code, expected = FAULTS[fault]
    network = "from cifar_exp.models.networks import convnet\ndef model(*, num_classes, width, depth):\n"
    network += "    return convnet(num_classes=num_classes, width=width, depth=depth)\n"
    (workplace / "faulty.py").write_text(code + network)
    own = ("model._target_=faulty.model", "trusted_modules=[faulty]")
    own += ("train.batch_norm=synchronized",) if fault.startswith("statistics") else ()
    done = cifar_exp("verify", *SMALL, *own, "devices.count=2", "progress=quiet")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith("DOES NOT HOLD: 2 ranks: ")
    assert done.stderr == ""
    content = report(workplace)
    assert content["holds"] is False
    (result,) = content["results"]
    assert expected <= failed(result)
    about = {check["subject"] for check in result["checks"] if check["name"] in failed(result)}
    evaluation = fault.startswith("shards")
    assert ("evaluation" in about, "gradients" in about) == (evaluation, not evaluation)
    assert ("images" in about) == fault.startswith("ranks draw")
    (page,) = (workplace / "outputs").rglob("parity.md")
    assert "DOES NOT HOLD" in page.read_text()


def test_quiet_prints_the_verdict_alone_and_needs_no_mlflow(workplace: Path) -> None:
    code = "import sys\nfrom cifar_exp.cli.main import main\nif __name__ == '__main__':\n"
    code += "    try: main()\n    finally: print('mlflow:', 'mlflow' in sys.modules, file=sys.stderr)\n"
    (workplace / "command.py").write_text(code)
    words = [sys.executable, "command.py", "verify", *SMALL, "devices.count=2", "progress=quiet", "hydra.run.dir=here"]
    done = subprocess.run(words, cwd=workplace, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "mlflow: False\n")
    assert done.stdout == "2 ranks compute what one rank computes: here/parity.md\n"
    assert {path.name for path in (workplace / "here").iterdir()} == {
        *("parity.md", "parity.json", "cifar-exp-verify.log"),
    }


REFUSED = {
    "train.epoch=3": (2, ("train.epoch", "Did you mean train.epochs?")),
    "model=convnt": (2, ("model=convnt", "Did you mean convnet?")),
    "experiment=quickstat": (2, ("Did you mean quickstart?",)),
    "train.epochs=0": (2, ("train.epochs=0", "Set train.epochs=1")),
    "train.epochs=[": (2, ("train.epochs=[", "override")),
    "model.width=4,8": (2, ("model.width",)),
    "devices.count=two,4": (2, ("devices.count", "whole number or auto")),
    "devices.count=1": (2, ("devices.count=1", "Set devices.count=1,2")),
    "devices.count=auto,2": (2, ("devices.count=auto,2", "auto alone")),
    "-m": (2, ("-m: there is no such option",)),
    "--config-dir=nowhere": (2, ("--config-dir nowhere",)),
    "devices=cpu devices.count=1,1000": (4, ("requested 1000 cores, found", "devices.oversubscribe=true")),
    "devices=cpu devices.count=2 devices.oversubscribe=true train.scaling=strong train.batch_size=255": (
        *(2, ("train.batch_size=255", "Set train.batch_size=256")),
    ),
    "devices=cpu devices.count=2 devices.oversubscribe=true train.batch_norm=synchronized train.accumulate=2": (
        *(2, ("train.accumulate=2", "Set train.accumulate=1")),
    ),
    "data=folders data.root=nowhere devices=cpu devices.count=1,2 devices.oversubscribe=true": (3, ("nowhere",)),
    "devices=cpu devices.count=1,2 devices.oversubscribe=true hydra.run.dir=.": (
        2,
        ("hydra.run.dir=.", "a new folder"),
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_errors_are_one_message_with_the_documented_exit_code(cifar_exp: Command, workplace: Path, words: str) -> None:
    code, parts = REFUSED[words]
    (workplace / "something").touch()
    done = cifar_exp("verify", *words.split())
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("cifar-exp: ")
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr
    assert not list(workplace.rglob("parity.*"))


def test_one_core_has_nothing_to_compare_and_gets_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "own_cores", lambda: [0])
    with pytest.raises(MachineError, match=r"found 1 core.*Set devices\.count=1,2 devices\.oversubscribe=true"):
        configurations(["devices=cpu"])


def test_ranks_are_powers_of_two_up_to_the_machines_and_strictness_can_be_typed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "own_cores", lambda: list(range(5)))
    configs, folder = configurations(["devices=cpu", "experiment=quickstart"])
    assert [config.devices.count for config in configs] == [1, 2, 4]
    assert {(config.train.precision, config.train.deterministic) for config in configs} == {("fp32", True)}
    assert configs[0].tracking == {"_target_": "cifar_exp.tracking.tracker.NoTracker"}
    assert re.fullmatch(r"outputs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-\d{6}", str(folder))
    typed = ["train.precision=bf16", "train.deterministic=false", "devices.count=2,3,2", "tracking.uri=http://x"]
    configs, _ = configurations(typed)
    assert [config.devices.count for config in configs] == [2, 3]
    assert {(config.train.precision, config.train.deterministic) for config in configs} == {("bf16", False)}


def test_a_users_own_config_folder_counts(workplace: Path) -> None:
    (workplace / "mi ne" / "model").mkdir(parents=True)
    (workplace / "mi ne" / "model" / "tiny.yaml").write_text("_target_: cifar_exp.models.networks.convnet\nwidth: 3\n")
    configs, _ = configurations(["--config-dir", "mi ne", "model=tiny", "devices.count=1,2"])
    assert configs[0].model == {"_target_": "cifar_exp.models.networks.convnet", "width": 3}
    with pytest.raises(ConfigError, match="model=tiny"):
        configurations(["model=tiny", "devices.count=1,2"])


@pytest.mark.parametrize("words", [["--help"], ["train.epochs=0", "--help"], ["train.epochs=0"]])
def test_help_and_refusals_do_not_wait_for_torch(workplace: Path, words: list[str]) -> None:
    code = (
        "import sys\nfrom cifar_exp.cli.main import main\n"
        "try: main()\nfinally: print('heavy:', {'torch', 'mlflow', 'torchvision', 'matplotlib'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, "verify", *words]
    done = subprocess.run(command, cwd=workplace, env=environment(), capture_output=True, text=True, check=False)
    assert "heavy: set()" in done.stdout
    if "--help" in words:
        assert done.returncode == 0
        assert "Exit codes: 0 the ranks compute the same, 1 they do not" in done.stdout


@linux
@pytest.mark.parametrize("moment", ["at once", "while ranks compute"])
def test_ctrl_c_ends_it_without_a_traceback(workplace: Path, moment: str) -> None:
    large = ["data.train_count=20000", "train.batch_size=256", "model.width=32", "model.depth=4", "devices.count=1,2"]
    words = [sys.executable, "-c", "from cifar_exp.cli.main import main; main()", "verify", *SMALL, *large]
    process = subprocess.Popen(
        words, cwd=workplace, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        if moment == "while ranks compute":
            wait_for(lambda: list((workplace / "outputs").rglob("*.log")), process)
            time.sleep(5)
        else:
            wait_for(lambda: answers_signals(process.pid), process)
            time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "stopped by signal 2" in errors
    assert not list(workplace.rglob("parity.*"))


PLAN = Plan(2, 2, 1, 4, 1, 2, 1, (0.1, 0.1), (1.0,))  # two ranks, two steps of 2 images each, one of nine left out


def rows(*names: int) -> Tensor:
    """Digests that differ by name."""
    return torch.tensor(names, dtype=torch.uint8)[:, None].expand(-1, 32).clone()


def measurement(inputs: list[list[int]], tested: list[int], **changes: Any) -> Measurement:
    """Of a rank with one parameter tensor of two numbers, or of several."""
    seen = torch.stack([rows(*step) for step in inputs])
    gradient = {"weight": torch.tensor([3.0, 4.0])}
    parameters = {step: {"weight": torch.tensor([1.0, 1.0 + 2 * step])} for step in range(3)}
    made = Measurement(
        *("fp32", seen, seen, [2.0, 1.0], {1: gradient, 2: gradient}, parameters, ["first", "second"]),
        evaluated=MetricValues(1.5, 0.5, 4),
        tested=rows(*tested),
        training_set=rows(*range(9)),
        test_set=rows(20, 21, 22, 23),
        network={},
    )
    return replace(made, **changes)


REFERENCE = measurement([[0, 1, 2, 3], [4, 5, 6, 7]], [20, 21, 22, 23])
FIRST, SECOND = measurement([[0, 1], [4, 5]], [20, 21]), measurement([[2, 3], [6, 7]], [22, 23])


def checks(first: Measurement = FIRST, second: Measurement = SECOND, reference: Measurement = REFERENCE) -> list[Check]:
    return compared(reference, [first, second], PLAN, tolerances("fp32", 2, is_synchronized=False))


def broken(made: list[Check]) -> dict[str, float]:
    return {check.name: check.measured for check in made if not check.holds}


def test_equal_measurements_have_no_difference() -> None:
    made = checks()
    assert broken(made) == {}
    assert {check.measured for check in made} == {0}
    assert [check.found for check in made[:3]] == ["0 of 4", "0", "1 of 9"]


def test_images_are_compared_by_step_and_micro_batch() -> None:
    swapped = broken(checks(first=measurement([[1, 0], [4, 5]], [20, 21])))
    assert swapped == {"micro-batches that differ in a bit": 1}
    doubled = broken(checks(second=measurement([[2, 3], [6, 0]], [22, 23])))
    assert doubled == {"micro-batches that differ in a bit": 1, "images doubled or foreign": 1, "images left out": 1}
    foreign = broken(checks(second=measurement([[2, 3], [6, 20]], [22, 23])))
    assert foreign == doubled


@pytest.mark.parametrize(
    ("gradient", "measured"),
    [([3.0, 4.0 + 4e-5], 8e-6), ([3.0, 4.001], 2e-4), ([6.0, 8.0], 1.0), ([3.0, float("nan")], float("nan"))],
)
def test_gradient_difference_is_relative_to_the_global_norm(gradient: list[float], measured: float) -> None:
    ours = {1: {"weight": torch.tensor(gradient)}, 2: FIRST.gradients[2]}
    made = checks(first=replace(FIRST, gradients=ours))
    (check,) = (check for check in made if check.name == "gradient of step 1")
    assert check.measured == pytest.approx(measured, rel=0.05, nan_ok=True)
    assert check.holds == (measured < 1e-5)
    assert check.detail == "weight"
    assert set(broken(made)) <= {"gradient of step 1"}


def test_the_tensor_with_the_largest_difference_is_named() -> None:
    theirs = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert relative_difference({"a": torch.tensor([3.1]), "b": torch.tensor([4.2])}, theirs) == (
        pytest.approx(0.04),
        "b",
    )
    infinite = {"a": torch.tensor([float("inf")]), "b": torch.tensor([float("nan")])}
    assert relative_difference(infinite, infinite) == (0.0, "")
    assert relative_difference({}, theirs)[0] == float("inf")


def test_step_skipped_on_one_side_only_fails_the_check() -> None:
    skipped = {2: FIRST.gradients[2]}
    assert broken(checks(first=replace(FIRST, gradients=skipped))) == {"gradient of step 1": float("inf")}
    both = checks(first=replace(FIRST, gradients=skipped), reference=replace(REFERENCE, gradients=skipped))
    assert broken(both) == {}
    assert "skipped" in next(check.found for check in both if check.name == "gradient of step 1")


def test_parameter_difference_is_relative_to_the_step_length() -> None:
    moved = FIRST.parameters | {2: {"weight": torch.tensor([1.0, 5.2])}}
    assert broken(checks(first=replace(FIRST, parameters=moved))) == {
        "parameters after steps 1 to 2": pytest.approx(0.1)
    }
    other = replace(SECOND, parameter_digests=["first", "other"])
    assert broken(checks(second=other)) == {"ranks with other parameters": 1}


def test_parameters_without_a_gradient_are_not_compared() -> None:
    """An optimizer that divides by the size of a gradient moves them as far as others, wherever rounding points."""
    reference, first = (
        replace(
            one,
            parameters={step: given | {"bias": torch.tensor([way * step])} for step, given in one.parameters.items()},
            gradients={step: given | {"bias": torch.tensor([way * 1e-7])} for step, given in one.gradients.items()},
        )
        for one, way in ((REFERENCE, 1.0), (FIRST, -1.0))
    )
    made = checks(first=first, reference=reference)
    assert broken(made) == {}
    assert any(check.detail.startswith("1 parameters whose gradient is zero apart from rounding") for check in made)


@pytest.mark.parametrize(
    ("tested", "misplaced"), [([22, 23, 23], 1), ([22], 1), ([23, 22], 2), ([21, 22, 23], 3), ([], 2)]
)
def test_every_test_image_must_be_evaluated_once_and_in_order(tested: list[int], misplaced: int) -> None:
    second = replace(SECOND, tested=rows(*tested) if tested else torch.empty(0, 32, dtype=torch.uint8))
    assert broken(checks(second=second)) == {"images missing, doubled or misplaced": misplaced}


def test_counts_and_accuracies_must_be_exact_and_losses_close() -> None:
    for evaluated, expected in (
        (MetricValues(1.5, 0.5, 5), {"images counted": 1}),
        (MetricValues(1.5, 0.75, 4), {"accuracy": 0.25}),
        (MetricValues(1.5 + 1e-6, 0.5, 4), {}),
        (MetricValues(1.5 + 3e-6, 0.5, 4), {"loss": pytest.approx(2e-6, rel=0.01)}),
        (MetricValues(float("nan"), 0.5, 4), {"loss": pytest.approx(float("nan"), nan_ok=True)}),
    ):
        assert broken(checks(first=replace(FIRST, evaluated=evaluated))) == expected


def test_report_names_failed_checks_and_its_json_has_no_nan() -> None:
    lost = replace(FIRST, gradients={step: {"weight": torch.tensor([3.0, float("nan")])} for step in (1, 2)})
    results = [ParityResult(1, "one", checks(), {}), ParityResult(2, "two", checks(first=lost), {})]
    made = ParityReport("a network", "cifar-exp verify", "fp32", "1e-5 is allowed", {"seed": "0"}, {}, results)
    assert not made.holds
    assert made.verdict == "DOES NOT HOLD: 2 ranks: gradient of step 1 (nan, must be <= 1e-05), and 1 more"
    assert "| gradient of step 2 | <= 1e-05 | 0, holds | nan, DOES NOT HOLD |" in made.markdown()
    assert "- gradient of step 1, 2 ranks: weight" in made.markdown()
    plain = json.loads(json.dumps(made.content(), allow_nan=False))
    assert [result["holds"] for result in plain["results"]] == [True, False]
    assert plain["results"][1]["checks"][3] == {
        **{"subject": "gradients", "name": "gradient of step 1", "wanted": "<= 1e-05", "found": "nan"},
        **{"measured": None, "tolerance": 1e-5, "detail": "weight", "holds": False},
    }


def test_tolerance_is_larger_if_both_sides_round_differently() -> None:
    """Dividing by a power of two is exact; float16 loses small numbers; joined statistics change the forward pass."""
    alike = tolerances("fp32", 4, is_synchronized=False)
    assert (alike.gradient, alike.loss, alike.accuracy, alike.evaluation_loss) == (1e-5, 1e-6, 0, 1e-6)
    assert tolerances("bf16", 2, is_synchronized=False).gradient == alike.gradient
    assert tolerances("fp32", 1, is_synchronized=True) == alike
    assert tolerances("fp32", 3, is_synchronized=False).gradient == 1e-4
    for precision, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert tolerances(precision, 3, is_synchronized=False).gradient == 4 * torch.finfo(kind).eps
    assert tolerances("fp16", 4, is_synchronized=False) == tolerances("fp16", 3, is_synchronized=False)
    joined = tolerances("fp32", 2, is_synchronized=True)
    assert (joined.gradient, joined.loss, joined.accuracy) == (5e-2, 1e-5, 0)


def test_image_digest_covers_all_values_and_the_label() -> None:
    images = torch.rand(3, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    images[2] = images[0]
    first, second, third = digests(images, torch.tensor([1, 1, 2]))
    assert len({bytes(row.tolist()) for row in (first, second, third)}) == 3
    assert torch.equal(digests(images[2:], torch.tensor([1]))[0], first)
    changed = images.clone()
    changed[0, 2, 3, 3] = torch.nextafter(changed[0, 2, 3, 3], torch.tensor(2.0))
    assert not torch.equal(digests(changed[:1], torch.tensor([1]))[0], first)
