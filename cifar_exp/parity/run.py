"""A parity check in the parent process: launch the ranks and compare their measurements with one rank's."""

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from cifar_exp.config.schema import Config
from cifar_exp.data.dataset_files import DatasetFiles
from cifar_exp.data.validation_split import hold_out
from cifar_exp.errors import ConfigError
from cifar_exp.launch.devices import DeviceSet, find_devices
from cifar_exp.models.build import parameter_count
from cifar_exp.parity.checks import Tolerances, compared, epoch_digest, tolerances
from cifar_exp.parity.measure import REFERENCE_FILE, STEPS, Measurement, measure_ranks, measure_reference, rank_file
from cifar_exp.parity.report import ParityReport, ParityResult, listed
from cifar_exp.runs.components import Components
from cifar_exp.runs.config_changes import config_hash
from cifar_exp.runs.model_check import checked_model, try_out
from cifar_exp.runs.plan_job import new_job
from cifar_exp.runs.prepare import title
from cifar_exp.system import machine
from cifar_exp.system.redaction import masked
from cifar_exp.system.temp_folder import private_folder
from cifar_exp.training.plan import Plan, check_scaling, make_plan
from cifar_exp.worker.job import Job


@dataclass(frozen=True)
class Case:
    """One number of ranks, ready to be measured.

    Attributes:
        config: the configuration of these ranks.
        components: its components.
        devices: their devices.
    """

    config: Config
    components: Components
    devices: DeviceSet

    def plan(self, data: DatasetFiles) -> Plan:
        """The plan of a whole run on these ranks."""
        return make_plan(self.config, self.devices.world_size, data.train_count, self.components.schedule)

    def on_one_rank(self) -> "Case":
        """One rank that accumulates the gradients of all ranks' micro-batches, with batch norm over each of them.

        With synchronized batch norm it trains on one batch of that size instead.
        """
        ranks, train = self.devices.world_size, self.config.train
        in_turn = replace(train, accumulate=ranks * train.accumulate)
        at_once = replace(train, batch_size=train.batch_size * (ranks if train.scaling == "weak" else 1))
        train = at_once if train.batch_norm == "synchronized" else in_turn
        return Case(replace(self.config, train=train), self.components, replace(self.devices, world_size=1))

    def allowed(self, precision: str) -> Tolerances:
        """The allowed differences by rounding in ``precision``."""
        return tolerances(precision, self.devices.world_size, self.config.train.batch_norm == "synchronized")


def prepared(configs: Sequence[Config], components: Sequence[Components]) -> list[Case]:
    """A case for each configuration.

    Raises:
        ConfigError: ranks cannot share the batch, or one rank cannot train on it.
        MachineError: there are too few devices.
    """
    for config in configs:
        if (hosts := config.launcher.get("hosts") or 1) != 1:
            raise ConfigError(f"launcher.hosts={hosts}: verify compares ranks of one host. Set launcher.hosts=1")
    cases = [Case(config, its, find_devices(config.devices)) for config, its in zip(configs, components, strict=True)]
    for case in cases:
        check_scaling(case.config, case.devices.world_size)
    return cases


def check_parity(cases: Sequence[Case], command: str, console: Console) -> ParityReport:
    """Measure each number of ranks and compare it with one rank.

    Args:
        cases: at least one.
        command: the command line, without secrets.
        console: prints progress.

    Raises:
        CifarExpError: as in training.
    """
    first = cases[0]
    data = hold_out(first.components.dataset(), first.config.validation)
    with private_folder() as work:
        results = [_result(case, data, work / str(case.devices.world_size), console) for case in cases]
    precision = results[0].figures["precision"]
    return ParityReport(
        title=title(first.config),
        command=command,
        precision=precision,
        rounding=_rounding({case.devices.world_size: case.allowed(precision).why for case in cases}),
        about=_facts(cases, data),
        settings=masked(asdict(first.config)),
        results=results,
    )


def _result(case: Case, data: DatasetFiles, folder: Path, console: Console) -> ParityResult:
    """Measure one case. ``folder``: a new folder for the measurements."""
    plan, count = case.plan(data), case.devices.world_size
    has_unused = bool(try_out(case.config, case.components, plan, data, case.devices.accelerator).unused)
    folder.mkdir()
    one = case.on_one_rank()
    console.print(f"measuring {listed([count])}, after one rank ...", highlight=False)
    one.components.launcher.launch(measure_reference, _job(one, data, folder, has_unused))
    case.components.launcher.launch(measure_ranks, _job(case, data, folder, has_unused))
    reference = Measurement.load(folder / REFERENCE_FILE)
    ranks = [Measurement.load(folder / rank_file(rank)) for rank in range(count)]
    checks = compared(reference, ranks, plan, case.allowed(reference.precision))
    return ParityResult(count, str(case.devices), checks, _figures(plan, reference, ranks))


def _job(case: Case, data: DatasetFiles, folder: Path, has_unused: bool) -> Job:
    hashed = config_hash(case.config)
    plan, began = case.plan(data), time.monotonic()
    job = new_job(case.config, hashed, case.components, case.devices, plan, data, folder, began)
    return replace(job, has_unused=has_unused)


def _figures(plan: Plan, reference: Measurement, ranks: Sequence[Measurement]) -> dict[str, Any]:
    """The measurements behind the checks."""
    first = ranks[0]
    return {
        "precision": reference.precision,
        "per_device_batch_size": plan.per_device_batch_size,
        "micro_batches_a_rank": plan.accumulate,
        "global_batch_size": plan.global_batch_size,
        "steps_per_epoch": plan.steps_per_epoch,
        "dropped_images": plan.dropped_images,
        "learning_rates": plan.learning_rates[: len(reference.losses)],
        "losses": {"ranks": first.losses, "one_rank": reference.losses},
        "evaluated": {"ranks": vars(first.evaluated), "one_rank": vars(reference.evaluated)},
        "epoch_sha256": {"ranks": epoch_digest(ranks), "one_rank": epoch_digest([reference])},
        "parameters_sha256": {
            "ranks": [rank.parameter_digests for rank in ranks],
            "one_rank": reference.parameter_digests,
        },
    }


def _rounding(why: Mapping[int, str]) -> str:
    """The explanation for each number of ranks; equal ones are merged."""
    texts = {text: [count for count in why if why[count] == text] for text in why.values()}
    return " ".join(f"{listed(counts)}: {text}" if len(texts) > 1 else text for text, counts in texts.items())


def _facts(cases: Sequence[Case], data: DatasetFiles) -> dict[str, str]:
    """Facts about configuration and machine, as names and texts."""
    first = cases[0]
    config, train = first.config, first.config.train
    model = checked_model(config, first.components, len(data.classes), data.image_size)
    share = "a device" if train.scaling == "weak" else "in all"
    micro_batches = f", {train.accumulate} micro-batches per device" if train.accumulate > 1 else ""
    devices = "; ".join(dict.fromkeys(str(case.devices) for case in cases))
    backend = "NCCL" if first.devices.accelerator == "gpu" else "gloo"
    described = machine.description(first.devices.accelerator, max(case.devices.world_size for case in cases))
    return {
        "data": f"{data.train_count:,} training and {data.test_count:,} test images in {len(data.classes)} classes, "
        f"{data.image_size[0]} x {data.image_size[1]} pixels; sha256 {data.content_hash}",
        "network": f"{_summary(config.model)}; {parameter_count(model):,} parameters",
        "batch": f"{train.batch_size} images {share}{micro_batches}; train.scaling={train.scaling}",
        "augmentation": f"{_summary(config.augment)}; train.normalization={train.normalization}",
        "batch norm": f"train.batch_norm={train.batch_norm}",
        "optimizer": f"{_summary(config.optimizer)}; train.lr_scaling={train.lr_scaling}",
        "arithmetic": f"train.precision={train.precision}, train.deterministic={str(train.deterministic).lower()}, "
        f"seed={config.seed}",
        "extent": f"one epoch's images, {STEPS} training steps, the whole test set",
        "devices": f"{devices}; {backend}",
        "machine": machine.in_one_line(described),
        "versions": f"cifar-exp {version('cifar-exp')}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy")),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _summary(section: Mapping[str, Any]) -> str:
    """For example ``SGD lr=0.1 momentum=0.9``."""
    settings = [f"{name}={value}" for name, value in masked(section).items() if name != "_target_"]
    return " ".join([section["_target_"].rpartition(".")[2], *settings])
