"""Apple's GPU: chosen, refused, and a rank's steps on tensors that have a shape, a type and its device, but no numbers.

No such GPU is needed (torch's FakeTensorMode). What MPS has not (float64, operators) fails here as it would there, as
far as PyTorch's own table of operators tells. Numbers, speed and memory on the hardware are not tested.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchgen
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cifar_exp.data.sources import residency_on
from cifar_exp.distributed import data_parallel
from cifar_exp.distributed.collectives import all_gather_numbers, average_buffers, broadcast_buffers, sum_over_ranks
from cifar_exp.distributed.process_group import World
from cifar_exp.errors import MachineError
from cifar_exp.launch.devices import device_counts, find_devices
from cifar_exp.system import accelerator, host
from cifar_exp.system.machine import description
from cifar_exp.training.metrics import MetricSums, MetricValues
from cifar_exp.training.trainer import Trainer
from cifar_exp.worker.training_setup import TrainingSetup
from tests.conftest import TINY, Command
from tests.helpers.configs import default_config
from tests.helpers.fake_tensors import GPU, fake_rank, fake_tensors

MPS = torch.device("mps")
# GPU plays MPS where there are tensors: torch makes none of a device it was not built for.
CPU = torch.device("cpu")
DEVICES = default_config().devices


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with Apple's GPU and eight cores."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(host, "own_cores", lambda: list(range(8)))
    monkeypatch.setattr("cifar_exp.launch.devices.usable_cores", lambda: 8)


@pytest.mark.usefixtures("apple")
def test_auto_prefers_cuda_then_mps_then_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_devices(DEVICES)
    assert (found.accelerator, found.world_size, found.threads, str(found)) == ("mps", 1, 8, "1 GPU (found 1 GPU)")
    assert device_counts(DEVICES) == [1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_devices(DEVICES).accelerator == "gpu"
    assert find_devices(replace(DEVICES, accelerator="mps")).accelerator == "mps"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert find_devices(DEVICES).accelerator == "cpu"


@pytest.mark.usefixtures("apple")
@pytest.mark.parametrize("kind", ["auto", "mps"])
def test_several_mps_ranks_are_refused_with_a_remedy(kind: Any) -> None:
    with pytest.raises(MachineError, match=r"devices\.count=2.*Set devices\.count=1, or devices=cpu devices\.count=2"):
        find_devices(replace(DEVICES, accelerator=kind, count=2))


def test_missing_mps_is_refused_and_leaves_no_files(cifar_exp: Command, workplace: Path) -> None:
    done = cifar_exp(*TINY, "devices=mps", "hydra.run.dir=run")
    assert done.returncode == 4
    assert "devices.accelerator=mps" in done.stderr
    assert "Set devices=cpu" in done.stderr
    assert not list(workplace.glob("run/run.json"))


def test_bfloat16_is_refused_where_macos_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: asked.append(version))
    with pytest.raises(MachineError, match=r"train\.precision=bf16.*Set train\.precision=fp16"):
        accelerator.check_precision("bf16", "mps")
    assert asked == [(14, 0)]
    for choice, kind in (("fp16", "mps"), ("auto", "mps"), ("bf16", "cpu"), ("bf16", "gpu")):
        accelerator.check_precision(choice, kind)
    assert accelerator.resolve_precision("auto", MPS) == torch.float32
    assert accelerator.resolve_precision("fp16", MPS) == torch.float16


def test_images_stay_on_the_host_if_they_would_fill_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(recommended_max_memory=lambda: 1000, driver_allocated_memory=lambda: 200)
    monkeypatch.setattr(torch, "mps", memory)
    assert residency_on(MPS, "auto", 400) == "device"
    assert residency_on(MPS, "auto", 401) == "host"
    assert residency_on(CPU, "auto", 10**15) == "device"
    assert not accelerator.supports_async_copies(MPS)


def test_rng_state_of_the_device_is_saved_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []
    state = torch.tensor([7], dtype=torch.uint8)
    monkeypatch.setattr(torch, "mps", SimpleNamespace(get_rng_state=lambda: state, set_rng_state=taken.append))
    saved = accelerator.random_state(MPS)
    accelerator.set_random_state(saved, MPS)
    assert taken == [state]
    assert torch.equal(saved["random"], torch.get_rng_state())
    accelerator.set_random_state({"random": saved["random"]}, MPS)  # of a run on CPUs
    assert len(taken) == 1


def test_the_gpu_is_named_by_the_processor() -> None:
    tags = description("mps", 1)
    assert tags["machine.gpus"] == tags["machine.processor"]


@cache
def operators_of_mps() -> set[str]:
    """Those that PyTorch's table gives to MPS, or to all devices because they consist of others or only of views."""
    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    content = yaml.load(table.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    by_name = {entry["func"].partition("(")[0]: entry for entry in content}

    def has(name: str) -> bool:
        entry = by_name[name]
        if "structured_delegate" in entry:
            return has(entry["structured_delegate"])
        keys = [key.strip() for keys in entry.get("dispatch", {"Composite": ""}) for key in keys.split(",")]
        return any(key.startswith("Composite") or key == "MPS" for key in keys)

    return {name for name in by_name if has(name)}


class OnlyWhatMPSHas(TorchDispatchMode):
    """Fails at float64 on the device, and at an operator that it lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [it for it in tree_leaves((args, kwargs, result)) if isinstance(it, Tensor) and it.device == GPU]
        assert torch.float64 not in {tensor.dtype for tensor in tensors}, f"{function} in float64"
        if tensors and function.namespace == "aten":
            name = str(function).removeprefix("aten.").removesuffix(".default")
            self.operators.add(name)
            assert name in operators_of_mps(), f"{function} is none of MPS's"
        return result


@pytest.fixture
def only_mps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(accelerator, "_is_mps", lambda device: device == GPU)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)  # which is not asked about MPS
    with fake_tensors(monkeypatch):
        yield


def rank_on_mps(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str) -> TrainingSetup:
    monkeypatch.setattr("cifar_exp.cpu_kernels.fuse.fuse", lambda *_: pytest.fail("kernels are for the processor"))
    return fake_rank(monkeypatch, folder, "mps", *overrides, images=1000)


RECIPES = (
    ("experiment=reference",),
    ("experiment=reference", "train.normalization=zscore", "augment=crop", "train.batch_norm=local"),
    ("optimizer=adamw", "schedule=cosine", "train.weight_averaging=0.9"),
    ("experiment=speedrun", "train.precision=bf16"),
    ("experiment=speedrun94", "train.precision=fp32"),
)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.usefixtures("only_mps")
def test_epoch_uses_no_operation_that_mps_lacks(
    recipe: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *_: True)
    monkeypatch.setattr(data_parallel.dist, "all_reduce", _only_on_the_host)
    monkeypatch.setattr(data_parallel.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(data_parallel.dist, "broadcast", _only_on_the_host)
    monkeypatch.setattr(MetricValues, "of", lambda sums: _only_on_the_host(sums) or MetricValues(1.0, 0.5, 1000))
    monkeypatch.setattr(Trainer, "_gather_times", lambda _: None)
    rank = rank_on_mps(monkeypatch, tmp_path, *recipe, "train.epochs=1", "train.batch_size=250")
    with OnlyWhatMPSHas() as seen:
        trained = rank.trainer.train_one_epoch(1, rank.batches)
        rank.trainer._validate(replace(rank.test, batch_size=500), 1, rank.batches)
    assert trained["train/accuracy"] == 0.5
    assert rank.trainer.step >= 4
    assert {"convolution", "index_select"} <= seen.operators
    assert next(rank.model.parameters()).device == GPU


def _only_on_the_host(values: Tensor, **_: int) -> None:
    assert values.device == CPU
    assert values.dtype in (torch.float64, torch.float32)


@pytest.mark.usefixtures("only_mps")
@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        (lambda: torch.ones(3, device=GPU).double(), "float64"),
        (lambda: torch.linalg.eig(torch.ones(3, 3, device=GPU)), "none of MPS's"),
    ],
)
def test_use_of_an_operation_that_mps_lacks_is_detected(what: Callable[[], object], complaint: str) -> None:
    with OnlyWhatMPSHas(), pytest.raises(AssertionError, match=complaint):
        what()


def test_float64_sums_on_the_cpu_are_the_same(only_rank: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without float64, played by the CPU."""
    monkeypatch.setattr("cifar_exp.training.metrics.exact_device", lambda _: MPS)  # another one than its own
    metric_sums = MetricSums(only_rank.device)
    assert metric_sums.sums.dtype == torch.float32
    logits, labels = torch.eye(10), torch.arange(10)
    for _ in range(1000):
        metric_sums.add(torch.tensor(0.1), logits, labels)
    read = metric_sums.read()
    assert read.dtype == torch.float64
    assert read.tolist() == [pytest.approx(1000, rel=1e-4), 10000, 10000]
    assert metric_sums.read_and_reset().tolist() == read.tolist()
    assert metric_sums.read().tolist() == [0, 0, 0]


def test_one_ranks_sums_and_buffers_are_as_they_were(only_rank: World) -> None:
    model = nn.BatchNorm2d(3)
    model.running_mean = torch.tensor([1.0, 2.0, 3.0])
    average_buffers(model)
    broadcast_buffers(model)
    assert model.running_mean.tolist() == [1, 2, 3]
    assert sum_over_ranks(torch.tensor([1.5])).tolist() == [1.5]
    assert all_gather_numbers([1.0, 2.0], only_rank.device).tolist() == [[1, 2]]
