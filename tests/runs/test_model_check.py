"""A network, optimizer or schedule that cannot work is refused in the parent: setting, rule and line."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from cifar_exp.config.reading import read_config
from cifar_exp.data.dataset_files import DatasetFiles
from cifar_exp.errors import ConfigError
from cifar_exp.runs.components import build
from cifar_exp.runs.model_check import Tried, try_out
from cifar_exp.training.plan import make_plan
from tests.helpers.configs import composed

OWN = "tests.helpers.user_code"
DATA = DatasetFiles(
    folder=Path(),
    classes=tuple("abcdefghij"),
    train_count=64,
    test_count=33,
    image_size=(16, 16),
    mean=(120.0, 120.0, 120.0),
    std=(60.0, 60.0, 60.0),
    content_hash="",
)


def tried(*overrides: str, data: DatasetFiles = DATA, accelerator: str = "cpu") -> Tried:
    """The trial of a run with these settings."""
    words = [f"trusted_modules=[{OWN}]", "train.batch_size=16", "train.epochs=2", "tracking=none"]
    config = read_config(composed(*words, *overrides))
    components = build(config)
    plan = make_plan(config, 1, data.train_count, components.schedule)
    return try_out(config, components, plan, data, accelerator)


def network(name: str) -> list[str]:
    return [f"model._target_={OWN}.{name}", "~model.width", "~model.depth"]


REFUSED = {
    "Pair": "returns an object of type tuple",
    "Narrow": "shape (4, 9)",
    "Map": "shape (4, 10, 1, 1)",
    "Labels": "int64 tensor",
    "Detached": "do not depend on its parameters",
    "NotANumber": "returns NaN or infinity in training",
    "Frozen": "has no parameter to train",
    "identity": "has no parameter to train",
    "Complex": "phase of tests.helpers.user_code.Complex is torch.complex64",
    "FailsInTraining": "in training: AssertionError: not while it trains (user_code.py, line ",
    "FailsInEvaluation": "in evaluation: KeyError: 'statistics' (user_code.py, line ",
    "Remembers": "backward pass of tests.helpers.user_code.Remembers fails: RuntimeError",
    "InPlace": "backward pass of tests.helpers.user_code.InPlace fails: RuntimeError",
    "OnGpu": "fails on 4 x 3 x 16 x 16 images in training",
    "Viewed": "(user_code.py, line ",
    "OnlyTwo": "shape (2, 20) for 4 x 3 x 16 x 16 images",
    "EvenOnly": "fails on 3 x 3 x 16 x 16 images in evaluation: RuntimeError",  # 33 test images
    "Grows": "seen of tests.helpers.user_code.Grows changes its shape while it trains, from (1, 4) to ",
    "Adds": "late of tests.helpers.user_code.Adds changes its shape while it trains, from none to (1,)",
    "NeverUsedLazy": "other.weight",
    "Secret": "get_extra_state",
    "exits": "SystemExit: no network for 10 classes (user_code.py, line ",
    "nothing": "returned None; it must return a torch.nn.Module",
    "asserts": "AssertionError: weights are for 1000 classes (user_code.py, line ",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_that_cannot_work_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        tried(*network(name))
    assert str(refusal.value).startswith("model: ")
    assert REFUSED[name] in str(refusal.value)
    assert str(refusal.value).partition(". ")[2]  # a remedy


@pytest.mark.parametrize("name", ["Base", "Lazy", "Volume", "Noted", "Squeezes", "Ghost"])
def test_a_network_that_works_is_not_refused(name: str) -> None:
    before = torch.get_rng_state()
    assert tried(*network(name)).unused == ()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_lazy_layer_gets_its_shape_and_the_seeds_weights() -> None:
    first, second = (tried(*network("Lazy"), "train.epochs=1").model.state_dict() for _ in range(2))
    assert first["head.0.weight"].shape == (8, 4)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_parameters_without_a_gradient_are_named() -> None:
    assert tried(*network("Unused")).unused == ("extra.weight", "extra.bias")


def test_last_batch_of_one_image_is_tried_if_there_is_one() -> None:
    with pytest.raises(ConfigError, match=r"float32 tensor of shape \(10,\)|bfloat16 tensor of shape \(10,\)"):
        tried(*network("Squeezes"), data=replace(DATA, test_count=501))


def test_batch_norm_over_single_values_is_refused_where_a_rank_has_one_image() -> None:
    tried(*network("Lazy"), "train.batch_size=2")
    with pytest.raises(ConfigError, match="fails on 1 x 3 x 16 x 16 images in training: ValueError: Expected more"):
        tried(*network("Lazy"), "train.batch_size=1")


def test_a_network_for_larger_images_is_refused() -> None:
    choice = ["model._target_=torchvision.models.alexnet", "~model.width", "~model.depth"]
    with pytest.raises(ConfigError, match=r"model: torchvision.models.alexnet fails on 4 x 3 x 16 x 16 images"):
        tried(*choice)


def test_network_that_needs_a_gpu_is_checked_there() -> None:
    assert tried(*network("OnGpu"), accelerator="gpu").unused == ()
    with pytest.raises(ConfigError, match="shape"):
        tried(*network("Narrow"), accelerator="gpu")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("torch.optim.LBFGS", "its step needs a closure"),
        (f"{OWN}.NeedsClosure", "its step needs a closure"),
        ("torch.optim.SparseAdam", "SparseAdam does not support dense gradients"),
        (f"{OWN}.Picky", "AssertionError: lr must be above 1 (user_code.py, line "),
        (f"{OWN}.Keeps", "the state of tests.helpers.user_code.Keeps cannot be saved and loaded"),
    ],
)
def test_an_optimizer_that_cannot_work_is_refused(name: str, part: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        tried(f"optimizer._target_={name}", "~optimizer.momentum", "~optimizer.weight_decay", *network("Base"))
    assert str(refusal.value).startswith("optimizer")
    assert part in str(refusal.value)
    assert "Set optimizer=sgd" in str(refusal.value)


def test_sparse_gradients_are_tried_with_the_plain_optimizers_too() -> None:
    with pytest.raises(ConfigError, match=r"optimizer: torch.optim.SGD fails in a step: .*add\(sparse, dense"):
        tried(*network("SparseGradients"), "optimizer.weight_decay=0.1")
    tried(*network("SparseGradients"), "optimizer.weight_decay=0")


def test_parity_of_batches_counts() -> None:
    tried(*network("EvenOnly"), data=replace(DATA, test_count=1032))
    with pytest.raises(ConfigError, match="fails on 3 x 3 x 16 x 16 images in training"):
        tried(*network("EvenOnly"), "train.batch_size=15", data=replace(DATA, test_count=1032))
    with pytest.raises(ConfigError, match="fails on 3 x 3 x 16 x 16 images in training"):
        tried(*network("Ghost"), "train.batch_size=15")


@pytest.mark.parametrize("name", [f"{OWN}.Sgd", "torch.optim.RMSprop"])
def test_other_optimizers_work(name: str) -> None:
    tried(f"optimizer._target_={name}", "~optimizer.momentum", "~optimizer.weight_decay", *network("Base"))


def scheduled(name: str) -> list[str]:
    return [f"schedule._target_={name}", "~schedule.drop_factor", "~schedule.drop_period"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (f"{OWN}.negative", "it returns -1.0 at step 7"),
        (f"{OWN}.not_a_number", "it returns nan at step 1"),
        (f"{OWN}.text", "it returns '0 of 8' at step 0"),
    ],
)
def test_a_schedule_that_returns_no_factor_is_refused(name: str, part: str) -> None:
    with pytest.raises(ConfigError, match="a number of at least 0") as refusal:
        tried(*scheduled(name))
    assert part in str(refusal.value)


CONTRACT = r"a schedule is a function of \(step, steps_per_epoch, epochs\)"


@pytest.mark.parametrize(
    "name",
    [
        "torch.optim.lr_scheduler.StepLR",
        "torch.optim.lr_scheduler.OneCycleLR",
        f"{OWN}.Scheduler",
        f"{OWN}.of_the_epoch",
    ],
)
def test_object_that_is_not_a_schedule_is_refused_with_the_signature(name: str) -> None:
    with pytest.raises(ConfigError, match=CONTRACT):
        tried(*scheduled(name))
    with pytest.raises(ConfigError, match=CONTRACT):  # also where torch is trusted
        tried(*scheduled(name), f"trusted_modules=[torch,{OWN}]")


def test_a_schedules_arguments_are_passed_by_name() -> None:
    config = read_config(composed(*scheduled(f"{OWN}.halves"), f"trusted_modules=[{OWN}]", "train.lr_scaling=none"))
    plan = make_plan(config, 1, 512, build(config).schedule)
    assert plan.learning_rates[:4] == pytest.approx([0.1, 0.1, 0.05, 0.05])


def test_model_check_does_not_change_the_global_rng() -> None:
    """Two trials and none: the ranks build their own network, so only the caller's generator could be moved."""
    torch.manual_seed(3)
    tried("model.width=4", "model.depth=1")
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), drawn)


def test_the_trial_uses_one_thread_and_restores_the_callers() -> None:
    seen: set[int] = set()
    before = torch.get_num_threads()
    hook = register_module_forward_hook(lambda *_: seen.add(torch.get_num_threads()))
    try:
        torch.set_num_threads(2)
        tried()
        assert seen == {1}
        assert torch.get_num_threads() == 2
    finally:
        hook.remove()
        torch.set_num_threads(before)
