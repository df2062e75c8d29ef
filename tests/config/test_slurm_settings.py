"""What a job of a sweep asks of Slurm: the settings of `hydra/launcher=slurm` and the devices of the job."""

from dataclasses import replace
from typing import Any

import pytest
from omegaconf import OmegaConf

from cifar_exp.config.defaults import conf_dir
from cifar_exp.config.schema import Devices
from cifar_exp.config.slurm_settings import Resources, SlurmSettings, resources
from cifar_exp.errors import ConfigError


def settings(**changed: Any) -> SlurmSettings:
    """The preset with some settings changed."""
    preset: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "hydra/launcher/slurm.yaml"))
    del preset["_target_"]
    return replace(SlurmSettings(**preset), **changed)


def devices(accelerator: Any = "cpu", count: Any = "auto", threads: Any = "auto") -> Devices:
    return Devices(accelerator, count, threads, oversubscribe=False)


@pytest.mark.parametrize(
    ("wanted", "changed", "asked"),
    [
        (devices(count=1), {}, Resources(1, 0)),
        (devices(count=3), {}, Resources(3, 0)),
        (devices(count=3, threads=4), {}, Resources(12, 0)),
        (devices(threads=4), {}, Resources(4, 0)),
        (devices(), {"cpus_per_task": 8}, Resources(8, 0)),
        (devices("gpu", 4), {}, Resources(None, 4)),
        (devices("gpu", 4), {"cpus_per_task": 16}, Resources(16, 4)),
        (devices("gpu"), {"gpus_per_node": 2}, Resources(None, 2)),
        (devices("auto", 2), {"gpus_per_node": 0}, Resources(2, 0)),
    ],
)
def test_a_job_asks_for_its_own_devices(wanted: Devices, changed: dict[str, Any], asked: Resources) -> None:
    assert resources(settings(**changed), wanted) == asked


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (devices("auto", 2), "devices=auto: .* Set devices=gpu or devices=cpu"),
        (devices("gpu"), "devices.count=auto: .*hydra.launcher.gpus_per_node"),
        (devices(), "devices.count=auto: .*hydra.launcher.cpus_per_task"),
        (devices("mps", 1), "devices=mps: "),
    ],
)
def test_devices_that_are_not_known_before_the_job_runs_are_refused(wanted: Devices, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resources(settings(), wanted)


def test_the_numbers_reach_sbatch_and_srun() -> None:
    asked = Resources(8, 2).parameters(settings(gpu_type="a100"))
    assert asked == {"gpus_per_node": "a100:2", "cpus_per_task": 8, "srun_args": ["--cpus-per-task=8"]}
    assert Resources(None, 0).parameters(settings()) == {}


@pytest.mark.parametrize("word", ["a b", "low\nrm -rf x", "'", "$(id)", "`id`", "a;b", ""])
def test_a_word_cannot_add_to_the_script_of_the_job(word: str) -> None:
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.partition="):
        settings(partition=word).check()


def test_usual_words_are_accepted_and_times_are_compared() -> None:
    settings(constraint="[rack1|rack2]&a100*2", nodelist="node[1-3,7]", account="dept/group@site").check()
    with pytest.raises(ConfigError, match="save_seconds=60: it must be less than the time limit of 60 seconds"):
        settings(time=1).check()
