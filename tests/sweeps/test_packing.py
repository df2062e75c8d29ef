"""The plan of a packed sweep: disjoint devices for each slot, the order of the jobs, and what is refused."""

from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from cifar_exp.errors import ConfigError, MachineError
from cifar_exp.sweeps.packing import Slot, check_devices, estimated_work, plan_slots, visible_gpus
from cifar_exp.system import cpu_quota, host

DEVICES = {"accelerator": "cpu", "count": 1, "threads": "auto", "oversubscribe": False}


def job(**devices: Any) -> DictConfig:
    return OmegaConf.create({"devices": DEVICES | devices})


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "own_cores", lambda: [0, 1, 2, 3, 8, 9, 10, 11])
    monkeypatch.setattr(cpu_quota, "cpu_quota", lambda: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("devices", "cores"),
    [
        ({}, [(0,), (1,), (2,), (3,), (8,), (9,), (10,), (11,)]),
        ({"count": 3}, [(0, 1, 2), (3, 8, 9)]),  # two cores are left over
        ({"count": 2, "threads": 2}, [(0, 1, 2, 3), (8, 9, 10, 11)]),
        ({"count": "auto"}, [(0, 1, 2, 3, 8, 9, 10, 11)]),
        ({"count": 20, "oversubscribe": True}, [(0, 1, 2, 3, 8, 9, 10, 11)]),
    ],
)
def test_each_slot_has_the_cores_of_one_job_and_shares_none(devices: Any, cores: list[tuple[int, ...]]) -> None:
    assert plan_slots([job(**devices)] * 3, None) == [Slot(own) for own in cores]


def test_a_quota_and_a_limit_reduce_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_slots([job()], 2) == [Slot((0,)), Slot((1,))]
    monkeypatch.setattr(cpu_quota, "cpu_quota", lambda: 3.5)
    assert plan_slots([job()], None) == [Slot((0,)), Slot((1,)), Slot((2,))]


def test_a_program_without_devices_gets_a_core_per_job() -> None:
    assert plan_slots([OmegaConf.create({"x": 1})], 1) == [Slot((0,))]


def test_each_slot_sees_its_own_gpus_and_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    wanted = [job(accelerator="auto", count=2)]
    assert plan_slots(wanted, None) == [Slot((0, 1, 2, 3), "0,1"), Slot((8, 9, 10, 11), "2,3")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,GPU-a,2,0")
    assert [slot.gpus for slot in plan_slots(wanted, None)] == ["7,GPU-a", "2,0"]
    assert visible_gpus("3,1", 2) == ["3", "1"]
    assert visible_gpus(None, 2) == ["0", "1"]


def test_a_sweep_over_devices_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"devices\.count=1,2\).*speedup would be wrong\. Set hydra/launcher=basic"):
        check_devices([job(), job(count=2)], None)
    with pytest.raises(ConfigError, match="need different devices"):
        check_devices([job(), job(threads=2)], None)
    check_devices([job(), job(threads=1)], None)  # the same devices, written in two ways
    with pytest.raises(MachineError, match="requested 99 cores, found 8"):
        check_devices([job(count=99)], None)
    with pytest.raises(ConfigError, match=r"n_jobs=0: it must be 1 or more"):
        check_devices([job()], 0)


def test_the_estimate_grows_with_epochs_images_depth_and_the_square_of_the_width() -> None:
    def work(epochs: int = 3, images: int | None = 100, **model: int) -> float:
        return estimated_work(
            OmegaConf.create({"train": {"epochs": epochs}, "data": {"train_count": images}, "model": model})
        )

    assert work(width=4, depth=2) == 3 * 100 * 16 * 2
    assert work(width=8, depth=2) == 4 * work(width=4, depth=2)
    assert work() == 300
    assert work(images=None) == 500 * work()
    assert work(epochs=6) == 2 * work()
