"""Build the ``Job`` for the ranks, and the run's title."""

from pathlib import Path

from cifar_exp.config.schema import Config
from cifar_exp.data.dataset_files import DatasetFiles
from cifar_exp.launch.devices import DeviceSet
from cifar_exp.runs.components import Components
from cifar_exp.system.printable import printable
from cifar_exp.training.plan import Plan
from cifar_exp.worker.job import Job


def new_job(
    config: Config,
    config_hash: str,
    components: Components,
    devices: DeviceSet,
    plan: Plan,
    data: DatasetFiles,
    run_dir: Path,
    started: float,
) -> Job:
    """Build the job of a new run.

    Args:
        config: the run's configuration.
        config_hash: hash of its settings that affect the result.
        components: its components.
        devices: the devices that it trains on.
        plan: steps, batch sizes and learning rates.
        data: the dataset, split into training, validation and test images.
        run_dir: the run folder.
        started: start of the run on the monotonic clock.
    """
    return Job(
        run_dir=run_dir,
        started=started,
        elapsed=0.0,
        config_hash=config_hash,
        resume_from=None,
        seed=config.seed,
        plan=plan,
        train=config.train,
        checkpoint=config.checkpoint,
        early_stopping=config.early_stopping,
        data=data,
        augmentation=components.augmentation,
        make_model=components.make_model,
        make_optimizer=components.make_optimizer,
        accelerator=devices.accelerator,
        threads=devices.threads,
        timeout=components.launcher.timeout,
    )


def title(config: Config) -> str:
    """The network and the dataset, such as ``convnet 32x4 on cifar10``."""
    model = config.model["_target_"].rpartition(".")[2]
    size = "x".join(str(config.model[key]) for key in ("width", "depth") if key in config.model)
    data = config.data["_target_"].rpartition(".")[2]
    if data == "folders":  # the root folder's name says more than `folders`
        data = Path(config.data["root"]).resolve().name
    return printable(f"{model} {size} on {data}".replace("  ", " "))
